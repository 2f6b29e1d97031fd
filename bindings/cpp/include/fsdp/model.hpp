// The description of a model: its module tree, its parameters and what initializes them, and which
// modules become units.
#pragma once

#include <fsdp.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>

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

class Trace;

/// Initializes the parameters of a module: writes every element of the tensors it is given, which
/// live for the call; see fsdp_module_init_t. May throw.
using ModuleInit = std::function<void(const fsdp_module_init_t&)>;
/// Initializes one parameter: writes every element of the tensor, which lives for the call. May
/// throw.
using ParamInit = std::function<void(std::uint32_t param, const fsdp_tensor_t&)>;

/// Where a sharded model was added: the numbers of its root module and of its first parameter. The
/// others follow in their old order.
struct AddedModel {
  std::uint32_t module;
  std::uint32_t param;
};

/// A module tree under description. Copies share it. Local: nothing here talks to other ranks.
/// One thread at a time.
class Model {
 public:
  /// A model whose root module (number 0, name "") has class `class_name`.
  explicit Model(const std::string& class_name) : initializers_(std::make_shared<Initializers>()) {
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
  /// created and must stay alive and unchanged until then. float32, float16 or bfloat16 on the CPU.
  /// With null data the parameter has no storage and gets its values when an engine is created; see
  /// set_reset().
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

  /// Sets what initializes the parameters without storage that `module` was the first to register,
  /// in place of an earlier function; see fsdp_model_set_reset. Engine's constructor calls it, in
  /// its thread, and rethrows what it throws. An empty function is an error.
  void set_reset(std::uint32_t module, ModuleInit init) {
    auto hook = make_hook(std::move(init));
    check(fsdp_model_set_reset(get(), module, hook->function ? &call_module : nullptr, hook.get()),
          "set_reset");
    initializers_->modules[module] = std::move(hook);
  }

  /// Sets what initializes one parameter without storage, in place of an earlier function; it comes
  /// before its module's. Otherwise as set_reset().
  void set_param_init(std::uint32_t param, ParamInit init) {
    auto hook = make_hook(std::move(init));
    check(fsdp_model_set_param_init(get(), param, hook->function ? &call_param : nullptr,
                                    hook.get()),
          "set_param_init");
    initializers_->params[param] = std::move(hook);
  }

  /// Overrides what the unit of this module is computed and reduced in, all zero for the engine's
  /// own; see fsdp_model_set_unit_dtypes.
  void set_unit_dtypes(std::uint32_t module, fsdp_dtype_t param_dtype, fsdp_dtype_t reduce_dtype) {
    check(fsdp_model_set_unit_dtypes(get(), module, param_dtype, reduce_dtype),
          "cannot set the types of a unit");
  }

  /// Overrides what a parameter is computed in; all zero for no override.
  void set_param_dtype(std::uint32_t param, fsdp_dtype_t dtype) {
    check(fsdp_model_set_param_dtype(get(), param, dtype), "cannot set the type of a parameter");
  }

  /// Throws what an initializer has thrown since the last call, if one has. For who creates
  /// engines.
  void rethrow() const {
    if (auto thrown = std::exchange(initializers_->thrown, nullptr)) std::rethrow_exception(thrown);
  }

  /// Adds the module tree of an engine below `parent`, sharded as it is: its units stay units, and
  /// engines made of this model share its shards and gradients; see fsdp_model_add_sharded. (A
  /// template because Engine is declared after Model.)
  template <class Engine>
  AddedModel add_sharded(std::uint32_t parent, const std::string& name, const Engine& engine) {
    AddedModel added{};
    check(fsdp_model_add_sharded(get(), parent, name.c_str(), engine.get(), &added.module,
                                 &added.param),
          "cannot add the sharded model '" + name + "'");
    return added;
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

  /// As wrap_size(), but only modules that the trace entered become units, and only parameters that
  /// it used count. (In trace.hpp.)
  inline void wrap_trace(const Trace& trace, std::uint64_t min_numel);

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
  struct Initializers;

  /// A function and where its exceptions go: what the C model holds the address of.
  template <class Function>
  struct Hook {
    Function function;
    Initializers* owner;
  };

  /// Shared by all copies, as the C model is.
  struct Initializers {
    std::map<std::uint32_t, std::unique_ptr<Hook<ModuleInit>>> modules;
    std::map<std::uint32_t, std::unique_ptr<Hook<ParamInit>>> params;
    std::exception_ptr thrown;
  };

  template <class Function>
  std::unique_ptr<Hook<Function>> make_hook(Function function) {
    return std::make_unique<Hook<Function>>(Hook<Function>{std::move(function),
                                                           initializers_.get()});
  }

  template <class Function, class... Args>
  static std::int32_t call(void* user_data, Args&&... args) {
    auto* hook = static_cast<Hook<Function>*>(user_data);
    try {
      hook->function(std::forward<Args>(args)...);
      return 0;
    } catch (...) {
      hook->owner->thrown = std::current_exception();
      return -1;
    }
  }

  static std::int32_t call_module(const fsdp_module_init_t* init, void* user_data) {
    return call<ModuleInit>(user_data, *init);
  }

  static std::int32_t call_param(std::uint32_t param, const fsdp_tensor_t* tensor,
                                 void* user_data) {
    return call<ParamInit>(user_data, param, *tensor);
  }

  std::shared_ptr<fsdp_model_t> handle_;
  std::shared_ptr<Initializers> initializers_;
};

}  // namespace fsdp
