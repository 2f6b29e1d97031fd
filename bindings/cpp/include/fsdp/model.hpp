// The description of a model: its module tree, its parameters, and which modules become units.
#pragma once

#include <fsdp.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>

#include "fsdp/error.hpp"
#include "fsdp/tensor_view.hpp"

namespace fsdp {

/// What a wrap callback is told about a module.
struct ModuleInfo {
  std::uint32_t module;    ///< the number add_module() gave it; 0 is the root
  std::string name;        ///< its dotted name from the root, "" for the root
  std::string class_name;  ///< as given to add_module()
  std::uint64_t numel;     ///< elements of the parameters below it that no nested unit owns yet
};

/// A module tree under description. Copies share it. Local: nothing here talks to other ranks.
/// One thread at a time.
class Model {
 public:
  /// A model whose root module (number 0, name "") has class `class_name`.
  explicit Model(const std::string& class_name) {
    fsdp_model_t* model = nullptr;
    check(fsdp_model_create(class_name.c_str(), &model), "cannot create the model");
    handle_.reset(model, fsdp_model_destroy);
  }

  /// Adds a module below `parent` and returns its number.
  std::uint32_t add_module(std::uint32_t parent, const std::string& name,
                           const std::string& class_name) {
    std::uint32_t module = 0;
    check(fsdp_model_add_module(get(), parent, name.c_str(), class_name.c_str(), &module),
          "cannot add module '" + name + "'");
    return module;
  }

  /// Adds a parameter of `module` and returns its number. The elements are read when an engine is
  /// created and must stay alive and unchanged until then. fp32 on the CPU.
  std::uint32_t add_parameter(std::uint32_t module, const std::string& name,
                              const TensorView& tensor, bool requires_grad = true) {
    const fsdp_tensor_t c_tensor = tensor.c_tensor();
    std::uint32_t param = 0;
    check(fsdp_model_add_parameter(get(), module, name.c_str(), &c_tensor, requires_grad ? 1 : 0,
                                   &param),
          "cannot add parameter '" + name + "'");
    return param;
  }

  /// Says that `name` of `module` is the parameter `param` under a second name.
  void tie_parameter(std::uint32_t module, const std::string& name, std::uint32_t param) {
    check(fsdp_model_tie_parameter(get(), module, name.c_str(), param),
          "cannot tie parameter '" + name + "'");
  }

  /// Makes one module a unit. Twice is an error.
  void wrap_module(std::uint32_t module) { check(fsdp_model_wrap_module(get(), module)); }

  /// Makes every module that owns parameters a unit.
  void wrap_always() { check(fsdp_model_wrap_always(get())); }

  /// Makes every module of this class a unit; an error if there is none.
  void wrap_class(const std::string& class_name) {
    check(fsdp_model_wrap_class(get(), class_name.c_str()));
  }

  /// Makes every module with at least `min_numel` elements below it, that no nested unit owns, a
  /// unit.
  void wrap_size(std::uint64_t min_numel) { check(fsdp_model_wrap_size(get(), min_numel)); }

  /// Makes every module a unit for which `want` returns true. An exception thrown by `want` stops
  /// the walk and is rethrown from here.
  void wrap_if(const std::function<bool(const ModuleInfo&)>& want) {
    struct Call {
      const std::function<bool(const ModuleInfo&)>& want;
      std::exception_ptr thrown;
    } call{want, nullptr};
    const auto trampoline = [](std::uint32_t module, const char* name, const char* class_name,
                               std::uint64_t numel, void* user_data) -> std::int32_t {
      auto* call = static_cast<Call*>(user_data);
      try {
        return call->want(ModuleInfo{module, name, class_name, numel}) ? 1 : 0;
      } catch (...) {
        call->thrown = std::current_exception();
        return -1;
      }
    };
    const fsdp_status_t status = fsdp_model_wrap_if(get(), +trampoline, &call);
    if (call.thrown) std::rethrow_exception(call.thrown);
    check(status, "wrap_if");
  }

  /// The C handle, owned by this object.
  fsdp_model_t* get() const noexcept { return handle_.get(); }

 private:
  std::shared_ptr<fsdp_model_t> handle_;
};

}  // namespace fsdp
