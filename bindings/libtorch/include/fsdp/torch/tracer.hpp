// From touched parameters to an execution order: which module's forward is running.
//
// C++ modules have no forward hooks. What is known is which parameters each operator reads, and
// which modules say themselves that they run (ModuleScope). The tracer keeps a stack of frames, one
// per module that is being called: *announced* ones, which their scope ends, and *inferred* ones,
// which end when something is touched that is not below their module. An inferred frame is one call
// of a module that the tracer sees from outside, so all it reads is one use; an announced one has
// a use per operator.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <utility>
#include <vector>

#include "fsdp/torch/module_walk.hpp"

namespace fsdp::detail {

class Tracer {
 public:
  /// Enters the root. `walk` must outlive the tracer.
  explicit Tracer(const ModuleWalk& walk)
      : walk_(walk), order_(walk.model), calls_(walk.parents.size(), 0) {
    push(0, true);
  }

  Tracer(const Tracer&) = delete;
  Tracer& operator=(const Tracer&) = delete;

  /// An operator reads these parameters: `leaves` themselves, of `views` views. `is_view`: it may
  /// return a view of an argument, so that what reads the values comes later.
  void operator_runs(const std::vector<std::uint32_t>& leaves,
                     const std::vector<std::uint32_t>& views, bool is_view) {
    rethrow();
    if (leaves.empty() && views.empty()) return;
    if (!leaves.empty()) {
      go_to(common_owner(leaves));
      const Frame& frame = top();
      const bool again = std::any_of(leaves.begin(), leaves.end(), [&](std::uint32_t param) {
        return contains(frame.computed, param);
      });
      if (again && !frame.announced) {
        const std::uint32_t module = frame.module;
        pop();
        push(module, false);
      }
    }
    Frame& frame = top();
    for (std::uint32_t param : leaves) add(frame.gathered, param);
    if (is_view) return;
    for (std::uint32_t param : leaves) add(frame.computed, param);
    for (std::uint32_t param : views) add(frame.computed, param);
    if (frame.announced) report();
  }

  /// `module` says that its forward begins; whether it is one of the traced ones.
  bool announce(const torch::nn::Module& module) {
    rethrow();
    const WalkedModule* walked = walk_.find(module);
    // The root has been entered: its scope says nothing new.
    if (walked == nullptr || walked->id == 0) return false;
    const auto inside_top = [&] {
      return walked->id != top().module && is_below(walked->id, top().module);
    };
    while (!top().announced && !inside_top()) pop();
    if (inside_top()) descend(walk_.parents[walked->id]);
    push(walked->id, true);
    return true;
  }

  /// The innermost announced forward ends.
  void end_announced() noexcept {
    try {
      while (!top().announced) pop();
      if (frames_.size() > 1) pop();
    } catch (...) {
      if (!error_) error_ = std::current_exception();
    }
  }

  /// The root's forward has ended: the order is complete.
  Trace finish() {
    rethrow();
    while (!frames_.empty()) pop();
    return order_;
  }

 private:
  struct Frame {
    std::uint32_t module;
    bool announced;
    std::vector<std::uint32_t> gathered;  ///< parameters to be reported as used, in order
    std::vector<std::uint32_t> computed;  ///< parameters that an operator has read in this call
  };

  static bool contains(const std::vector<std::uint32_t>& params, std::uint32_t param) {
    return std::find(params.begin(), params.end(), param) != params.end();
  }

  static void add(std::vector<std::uint32_t>& params, std::uint32_t param) {
    if (!contains(params, param)) params.push_back(param);
  }

  Frame& top() { return frames_.back(); }

  void rethrow() {
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  bool is_below(std::uint32_t module, std::uint32_t ancestor) const {
    while (module > ancestor) module = walk_.parents[module];
    return module == ancestor;
  }

  void push(std::uint32_t module, bool announced) {
    if (!frames_.empty()) report();
    order_.enter(module);
    frames_.push_back({module, announced, {}, {}});
    ++calls_[module];
  }

  void pop() {
    report();
    order_.leave(top().module);
    frames_.pop_back();
  }

  void report() {
    if (top().gathered.empty()) return;
    order_.use(top().gathered);
    top().gathered.clear();
  }

  /// Enters what is between the top frame and `module`, which is below it, and `module`.
  void descend(std::uint32_t module) {
    std::vector<std::uint32_t> path;
    for (std::uint32_t m = module; m != top().module; m = walk_.parents[m]) path.push_back(m);
    for (auto m = path.rbegin(); m != path.rend(); ++m) push(*m, false);
  }

  /// Makes `module` the current one, as far as announced frames allow.
  void go_to(std::uint32_t module) {
    while (!top().announced && !is_below(module, top().module)) pop();
    if (is_below(module, top().module)) {
      descend(module);
    } else if (!is_below(top().module, module)) {
      push(module, false);  // called by a module that it is not below
    }  // else an announced module reads what belongs to one around it
  }

  /// Whose call reads the parameter: a tied one's owner that is running, or was called least.
  std::uint32_t owner_of(std::uint32_t param) {
    const auto& owners = walk_.owners[param];
    if (contains(owners, top().module)) return top().module;
    return *std::min_element(
        owners.begin(), owners.end(),
        [this](std::uint32_t a, std::uint32_t b) { return calls_[a] < calls_[b]; });
  }

  std::uint32_t common_owner(const std::vector<std::uint32_t>& params) {
    std::uint32_t common = owner_of(params.front());
    for (std::uint32_t param : params) {
      const std::uint32_t owner = owner_of(param);
      while (!is_below(owner, common)) common = walk_.parents[common];
    }
    return common;
  }

  const ModuleWalk& walk_;
  Trace order_;
  std::vector<std::uint32_t> calls_;  // by module
  std::vector<Frame> frames_;         // from the root to the current module
  std::exception_ptr error_;          // of a scope's end, for the next call
};

}  // namespace fsdp::detail
