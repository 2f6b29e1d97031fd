// What happens between fully_shard and the end of the handle: the life of a forward and a backward.
//
// Units are unsharded when an operator touches them, inside the handle's forward (on its thread) or
// inside a backward pass, and are errors elsewhere. A unit is resharded when a unit that is neither
// its ancestor nor its descendant is touched, when its gradients have been reduced, and at the end
// of a forward or backward. Where a backward follows, the engine decides what the first and the last
// mean (reshard_after_forward): for the module the unit is closed, for the engine it may be there
// still, and opening it again costs nothing. Nothing is kept in thread-local storage.
#pragma once

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/torch.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "fsdp/torch/accumulator.hpp"
#include "fsdp/torch/grad_placement.hpp"
#include "fsdp/torch/shard_leaf.hpp"
#include "fsdp/torch/stream_copy.hpp"
#include "fsdp/torch/unit_storage.hpp"

namespace fsdp::detail {

/// A parameter of the module and its two faces.
struct ParamState {
  std::string name;   ///< dotted name from the root
  UnitStorage* unit;  ///< owned by the model state
  at::Tensor leaf;    ///< the module's own tensor, over the unit's storage
  at::Tensor shard;   ///< the sharded leaf that optimizers get
  at::Tensor poison;  ///< the leaf's `.grad`
  c10::intrusive_ptr<torch::autograd::Node> node;
  bool requires_grad = false;  ///< as the engine knows it
  bool arrived = false;        ///< has a gradient since its unit's last reduction
  bool in_engine = true;       ///< the engine may have a gradient of earlier backwards
  at::Tensor grad_view = {};   ///< of the gradient shard, for the shard's `.grad`
  PlacedGradient placed = {};  ///< computed where it is collected, on its way to the node
};

class ModelState final : public UnitHost,
                         public GradientSink,
                         public std::enable_shared_from_this<ModelState> {
 public:
  /// Filled by shard_module() right after construction.
  explicit ModelState(std::shared_ptr<ShardWrites> shards) : writes(std::move(shards)) {}

  ModelState(const ModelState&) = delete;
  ModelState& operator=(const ModelState&) = delete;

  ~ModelState() {
    if (replaced_) return;
    // The shards stay with the module: other ranks must not wait for what this one reads no more.
    if (!backward_open_ && !failed_) stop_reading();
    writes->detach();
    for (const auto& unit : units) unit->orphan();
  }

  const std::shared_ptr<ShardWrites> writes;
  bool summoned = false;          ///< full parameters are open
  bool is_last_backward = true;   ///< as the engine knows it
  std::vector<std::shared_ptr<UnitStorage>> units;  ///< by unit number
  std::vector<ParamState> params;                   ///< by parameter number
  std::unordered_map<const torch::nn::Module*, std::uint32_t> module_units;
  std::unordered_set<const c10::TensorImpl*> buffers;  ///< the module's
  std::optional<at::ScalarType> input_type;            ///< what forward casts its arguments to
  std::optional<at::ScalarType> output_type;           ///< and its results

  Engine& engine() { return writes->engine(); }

  // ---- the module being sharded again ----

  /// Throws when another model has the parameters now.
  void require_current() const {
    if (replaced_) throw Error(FSDP_ERR_INVALID_STATE, UnitStorage::kReplaced);
  }

  /// Throws inside of a forward or backward; ends an iteration whose backward has not come.
  void prepare_replacement() {
    if (forward_depth_ > 0 || backward_open_) {
      throw Error(FSDP_ERR_INVALID_STATE,
                  "a sharded module cannot be sharded again inside of its forward or backward");
    }
    settle();
    stop_reading();
  }

  /// The model of `successor` has the parameters from here on.
  void replace(const std::shared_ptr<ShardWrites>& successor) {
    replaced_ = true;
    for (const auto& unit : units) unit->replace();
    writes->hand_over(successor);
    for (ParamState& param : params) param.node.reset();
  }

  // ---- forward ----

  /// Opens the scope in which this thread's operators unshard. Nests. `training`: its order is
  /// compared. Collective only when the last backward failed.
  void begin_forward(bool training) {
    require_current();
    if (summoned) {
      throw Error(FSDP_ERR_INVALID_STATE,
                  "forward of a sharded model was called while its full parameters are open: "
                  "close what summon_full_params() returned first");
    }
    const std::thread::id self = std::this_thread::get_id();
    if (forward_thread_.load() == self) {
      ++forward_depth_;
      return;
    }
    std::thread::id nobody;
    if (!forward_thread_.compare_exchange_strong(nobody, self)) {
      throw Error(FSDP_ERR_INVALID_STATE,
                  "forward of a sharded model was called while another thread is inside it");
    }
    forward_depth_ = 1;
    try {
      if (backward_open_) return;
      settle();
      take_over_requires_grad();
      engine().begin_forward(training);
    } catch (...) {
      leave_forward();
      throw;
    }
  }

  /// Closes the scope. `backward_follows` says whether autograd recorded a graph.
  void end_forward(bool backward_follows) {
    if (--forward_depth_ > 0) return;
    leave_forward();
    reshard_all(backward_follows);
    if (backward_open_) return;
    engine().end_forward();
    if (!backward_follows) {
      engine().finish_forward();
      writes->on_closed();
    }
  }

  /// Closes the scope while an exception is on its way out.
  void abandon_forward() noexcept {
    try {
      end_forward(false);
    } catch (...) {
      // The error that is being thrown already is the one to report.
    }
  }

  // ---- touches ----

  void touch(UnitStorage& unit, const c10::OperatorHandle& op,
             const c10::TensorImpl& tensor) override {
    const auto turn = take_turn();
    if (forward_thread_.load(std::memory_order_relaxed) != std::this_thread::get_id()) {
      if (in_backward()) {
        enter_backward();
      } else if ((unit.pinned() && at::in_parallel_region()) || reads_no_data(op)) {
        return;  // the former: a worker thread of an operator that was let through
      } else {
        throw Error(FSDP_ERR_INVALID_STATE,
                    "parameter '" + unit.param_at(tensor) + "' is sharded and was used by " +
                        operator_name(op) +
                        " outside the sharded model's forward and backward: call the model "
                        "through the handle that fsdp::fully_shard returned (not the module's own "
                        "forward), and read shards and build optimizers from its parameters()");
      }
    }
    if (&unit != active_) activate(unit);
  }

  bool computes_forward() const noexcept override {
    // In a backward it is one that is computed again.
    return forward_thread_.load(std::memory_order_relaxed) == std::this_thread::get_id() ||
           (in_backward() && at::GradMode::is_enabled());
  }

  // ---- backward ----

  /// Called at the first sign of a backward pass; later calls in the same pass do nothing. Arranges
  /// for finish_backward at the end of the current graph task.
  void enter_backward() {
    const auto turn = take_turn();
    if (backward_open_) return;
    settle();
    torch::autograd::Engine::get_default_engine().queue_callback(
        [token = std::make_shared<BackwardToken>(weak_from_this())] { token->finish(); });
    backward_open_ = true;
    if (!writes->reading()) take_over_requires_grad();
    for (const auto& unit : units) {
      unit->expected = unit->arrived = 0;
      unit->pending.drop();
    }
    for (std::size_t i = 0; i < params.size(); ++i) {
      ParamState& param = params[i];
      param.arrived = false;
      if (param.leaf.requires_grad()) ++param.unit->expected;
      // While the iteration of an earlier backward is open, nobody has seen its gradients yet.
      if (!iteration_open_ && param.in_engine &&
          !holds_our_gradient(param, static_cast<std::uint32_t>(i))) {
        engine().clear_grad(static_cast<std::uint32_t>(i));
      }
    }
  }

  void accept_gradient(std::uint32_t index, const at::Tensor& gradient) override {
    const auto turn = take_turn();
    require_current();
    enter_backward();
    ParamState& param = params[index];
    // A backward that needs no parameter's value still takes part in an iteration.
    if (!writes->reading()) activate(*param.unit);
    UnitStorage& unit = *param.unit;
    const auto [region, accumulate] = engine().param_grad(index);
    if (!writes->device().is_cpu()) {
      copy_on_gpu(region, accumulate, param, gradient);
    } else if (accumulate || !param.placed.arrives_in_place(gradient)) {
      param.placed.move_out();
      store_gradient(region, accumulate, param, gradient);
    }
    if (!param.arrived) {
      param.arrived = true;
      ++unit.arrived;
    }
    if (unit.arrived == unit.expected) {
      copy_pending(unit);
      engine().reduce(unit.index);
      for (std::uint32_t id : unit.param_ids) params[id].arrived = false;
      unit.arrived = 0;
      if (!unit.pinned()) reshard(unit, /*keep=*/false);
    }
  }

  void expect_gradient(std::uint32_t index) override {
    if (!writes->device().is_cpu()) return;  // a copy on the device costs little
    ParamState& param = params[index];
    // Where only some gradients were asked for, this one may go elsewhere.
    const auto* chosen = torch::autograd::get_current_graph_task_exec_info();
    if (replaced_ || at::GradMode::is_enabled() || (chosen != nullptr && !chosen->empty()) ||
        !param.requires_grad || !param.placed.vacant()) {
      return;
    }
    enter_backward();
    if (!writes->reading()) activate(*param.unit);  // as accept_gradient
    placement_->expect(engine(), index, param.leaf, param.placed);
  }

  /// Finishes what a backward that threw has left open: a barrier first, so that a rank that failed
  /// alone is an error on every rank, then all gradients are dropped. Collective when there is
  /// something to finish.
  void settle() {
    if (!failed_) return;
    engine().communicator().barrier();
    engine().finish_forward();
    zero_grad();
    failed_ = false;
    iteration_open_ = false;
    writes->on_closed();
    restore_poison();
  }

  /// Makes every `.grad` of the shards undefined, and the engine forget its own. Local.
  void zero_grad() {
    engine().zero_grad();
    for (ParamState& param : params) {
      param.shard.mutable_grad().reset();
      param.in_engine = false;
    }
  }

  /// Puts back the `.grad` of the module's own parameters that zero_grad() has dropped.
  void restore_poison() {
    for (ParamState& param : params) {
      at::Tensor& grad = param.leaf.mutable_grad();
      if (!grad.defined()) grad = param.poison;
    }
  }

 private:
  /// Owned by autograd's graph task: either its end is reached, or it is dropped because of an
  /// exception.
  class BackwardToken {
   public:
    explicit BackwardToken(std::weak_ptr<ModelState> state) : state_(std::move(state)) {}
    BackwardToken(const BackwardToken&) = delete;
    BackwardToken& operator=(const BackwardToken&) = delete;
    ~BackwardToken() {
      if (const auto state = state_.lock()) state->abandon_backward();
    }
    void finish() {
      const auto state = state_.lock();
      if (!state) return;
      state->finish_backward();
      state_.reset();
    }

   private:
    std::weak_ptr<ModelState> state_;
  };

  static bool reads_no_data(const c10::OperatorHandle& op) {
    const std::string& name = op.operator_name().name;
    return name == "aten::_has_compatible_shallow_copy_type" || name == "aten::is_same_size" ||
           name == "aten::size" || name == "aten::stride" || name == "aten::sym_size" ||
           name == "aten::sym_stride" || name == "aten::sym_numel" || name == "aten::numel";
  }

  /// What the host has frozen or unfrozen since the last iteration.
  void take_over_requires_grad() {
    for (std::size_t i = 0; i < params.size(); ++i) {
      ParamState& param = params[i];
      if (param.leaf.requires_grad() == param.requires_grad) continue;
      engine().set_requires_grad(static_cast<std::uint32_t>(i), !param.requires_grad);
      param.requires_grad = !param.requires_grad;
      param.shard.set_requires_grad(param.requires_grad);
    }
  }

  void stop_reading() noexcept {
    if (!writes->reading()) return;
    try {
      engine().finish_forward();
    } catch (...) {
      // The communicator is broken: its error comes again at the next collective.
    }
    writes->on_closed();
  }

  /// On a GPU a backward may have two threads: that of the device, and the caller's for what is on
  /// the CPU.
  std::unique_lock<std::recursive_mutex> take_turn() {
    if (writes->device().is_cpu()) return {};
    return std::unique_lock<std::recursive_mutex>(mutex_);
  }

  static bool in_backward() { return torch::autograd::get_current_graph_task_id() != -1; }

  void leave_forward() {
    forward_depth_ = 0;
    forward_thread_.store(std::thread::id());
  }

  /// Unsharding in an order that depends only on what is touched, so that all ranks agree.
  void activate(UnitStorage& unit) {
    for (std::size_t i = unsharded_.size(); i-- > 0;) {
      UnitStorage& other = *unsharded_[i];
      const bool related =
          (other.tree_begin <= unit.tree_begin && unit.tree_begin < other.tree_end) ||
          (unit.tree_begin <= other.tree_begin && other.tree_begin < unit.tree_end);
      if (!related && !other.pinned()) {
        reshard(other, backward_open_ || at::GradMode::is_enabled());
      }
    }
    if (!unit.unsharded()) {
      writes->on_unshard();
      unit.unshard(engine());
      unsharded_.push_back(&unit);
    }
    active_ = &unit;
  }

  /// `keep`: a backward needs the unit again; the engine says what happens until then.
  void reshard(UnitStorage& unit, bool keep) {
    if (unit.unsharded()) {
      unit.mark_sharded();
      unsharded_.erase(std::find(unsharded_.begin(), unsharded_.end(), &unit));
      if (active_ == &unit) active_ = nullptr;
    }
    if (keep) {
      engine().reshard_after_forward(unit.index);
    } else {
      engine().reshard(unit.index);
    }
  }

  void reshard_all(bool keep) {
    while (!unsharded_.empty()) reshard(*unsharded_.back(), keep);
  }

  bool holds_our_gradient(const ParamState& param, std::uint32_t index) {
    const at::Tensor& grad = param.shard.grad();
    return grad.defined() && is_shard_view(grad, engine().shard(index));
  }

  static void store_gradient(const fsdp_tensor_t& region, bool accumulate, const ParamState& param,
                             const at::Tensor& gradient) {
    const std::int64_t numel = gradient.numel();
    if (numel == 0) return;
    char* data = static_cast<char*>(region.data) + region.byte_offset;
    const at::ScalarType type = scalar_type_of(region.dtype);
    const bool plain = gradient.is_cpu() && gradient.is_contiguous() &&
                       gradient.scalar_type() == type && !gradient.is_neg() &&
                       !is_sharded(gradient);
    if (!accumulate && plain) {
      if (numel < kLargeGradient) {
        std::memcpy(data, gradient.const_data_ptr(), gradient.nbytes());
      } else {
        stream_copy(data, gradient.const_data_ptr(), gradient.nbytes());
      }
      return;
    }
    at::Tensor target = tensor_at(data, param.leaf.sizes(), type, param.leaf.device());
    if (accumulate) {
      target.add_(gradient);
    } else {
      target.copy_(gradient);
    }
  }

  /// Keeps a gradient for the others of its unit, or copies it.
  void copy_on_gpu(const fsdp_tensor_t& region, bool accumulate, const ParamState& param,
                   const at::Tensor& gradient) {
    UnitStorage& unit = *param.unit;
    const bool waits = !accumulate && gradient.numel() > 0 && !is_sharded(gradient);
    if (!waits || !unit.pending.fits(gradient)) copy_pending(unit);
    if (!waits || !unit.pending.fits(gradient)) {
      engine();  // comes here again
      store_gradient(region, accumulate, param, gradient);
      return;
    }
    char* data = static_cast<char*>(region.data) + region.byte_offset;
    unit.pending.add(tensor_at(data, param.leaf.sizes(), at::kFloat, param.leaf.device()), gradient);
  }

  /// Copies the gradients of `unit` that wait, on the stream that they were computed on.
  void copy_pending(UnitStorage& unit) {
    if (unit.pending.empty()) return;
    const c10::StreamGuard there(unit.pending.stream());
    engine();  // goes there, too, so that its work comes before and after
    unit.pending.copy();
  }

  void empty_places() {
    for (ParamState& param : params) param.placed.move_out();
  }

  void finish_backward() {
    backward_open_ = false;
    failed_ = true;  // until everything below has succeeded
    empty_places();
    for (const auto& unit : units) copy_pending(*unit);
    reshard_all(false);
    engine().finish_backward();
    iteration_open_ = !is_last_backward;
    const torch::NoGradGuard no_grad;
    if (!iteration_open_) {
      writes->on_writable();
      for (std::uint32_t i = 0; i < params.size(); ++i) publish_gradient(i);
    }
    restore_poison();
    failed_ = false;
  }

  void publish_gradient(std::uint32_t index) {
    const Shard shard = engine().shard(index);
    params[index].in_engine = shard.grad != nullptr;
    if (shard.grad == nullptr) return;
    at::Tensor& grad = params[index].shard.mutable_grad();
    if (!grad.defined()) {
      at::Tensor& view = params[index].grad_view;
      if (view.defined() && is_shard_view(view, shard)) {
        grad = view;
        return;
      }
      bool moves = false;
      grad = grad_shard_view(writes, shard, &moves);
      view = moves ? at::Tensor() : grad;  // would keep memory that activations shall have
    } else if (!is_shard_view(grad, shard)) {
      grad.add_(grad_shard_view(writes, shard));  // a tensor of the user's own
    }
  }

  void abandon_backward() noexcept {
    if (!backward_open_) return;
    backward_open_ = false;
    failed_ = true;
    for (const auto& unit : units) unit->pending.drop();
    try {
      empty_places();
      reshard_all(false);
    } catch (...) {
      // The engine's own error comes again at the next call, which settles.
    }
  }

  const std::shared_ptr<GradPlacement> placement_ = std::make_shared<GradPlacement>();
  bool replaced_ = false;
  std::recursive_mutex mutex_;
  std::atomic<std::thread::id> forward_thread_{};
  int forward_depth_ = 0;
  bool backward_open_ = false;
  bool failed_ = false;
  bool iteration_open_ = false;  ///< the last backward was not the last one of its step
  UnitStorage* active_ = nullptr;        ///< the unit touched last, while unsharded
  std::vector<UnitStorage*> unsharded_;  ///< in the order of unsharding
};

/// The number of the unit that `module` is or, if it is none, that owns its parameters; throws if it
/// is not a part of the sharded model.
inline std::uint32_t unit_of_module(const ModelState& state, const torch::nn::Module& module) {
  const auto known = state.module_units.find(&module);
  if (known != state.module_units.end()) return known->second;
  throw Error(FSDP_ERR_INVALID_ARGUMENT,
              "module '" + module.name() + "' is not a part of this sharded model");
}

/// Backwards reduce no gradients while it lives.
class NoSync {
 public:
  explicit NoSync(std::shared_ptr<ModelState> state) : state_(std::move(state)) {}
  NoSync(NoSync&&) = default;
  NoSync& operator=(NoSync&&) = delete;
  ~NoSync() {
    if (!state_) return;
    try {
      state_->engine().set_requires_gradient_sync(true);
    } catch (...) {
      // The engine failed inside: every later call says so.
    }
  }

 private:
  std::shared_ptr<ModelState> state_;
};

}  // namespace fsdp::detail
