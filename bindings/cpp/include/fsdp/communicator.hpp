// The communicator: the ranks that train together, and the collectives a host may call itself.
#pragma once

#include <fsdp.h>

#include <cstdint>
#include <memory>
#include <string>

#include "fsdp/error.hpp"
#include "fsdp/tensor_view.hpp"

namespace fsdp {

/// How the elements of the ranks are combined by a reduction.
enum class ReduceOp : std::int32_t {
  sum = FSDP_REDUCE_SUM,
  avg = FSDP_REDUCE_AVG,
  max = FSDP_REDUCE_MAX,
  min = FSDP_REDUCE_MIN,
};

/// A group of ranks. Copies share the same communicator; an engine made on it keeps it alive. All
/// collectives must be called by every rank in the same order, from one thread at a time; a rank
/// that does otherwise makes every rank throw, naming the two calls that differ.
class Communicator {
 public:
  /// An empty reference: every use throws INVALID_HANDLE. Only good for being assigned to.
  Communicator() = default;

  /// From the launcher's environment (torchrun, Open MPI, Slurm, MPICH); with none, world size 1.
  /// Collective: returns when every rank has arrived, or throws naming the ranks that are missing.
  static Communicator from_env() {
    fsdp_comm_t* comm = nullptr;
    check(fsdp_comm_init_env(&comm), "cannot set up the communicator from the environment");
    return Communicator(comm);
  }

  /// World size 1, no other process involved. Local.
  static Communicator single() {
    fsdp_comm_t* comm = nullptr;
    check(fsdp_comm_init_single(&comm), "cannot set up the communicator");
    return Communicator(comm);
  }

  /// Shared memory between the processes of one user on one host that name the same `job`.
  /// Timeouts are in milliseconds, 0 for the defaults. Collective, as from_env().
  static Communicator shm(const std::string& job, int rank, int world_size,
                          std::int64_t rendezvous_timeout_ms = 0, std::int64_t timeout_ms = 0) {
    fsdp_shm_config_t config = FSDP_SHM_CONFIG_INIT;
    config.job = job.c_str();
    config.rank = rank;
    config.world_size = world_size;
    config.rendezvous_timeout_ms = rendezvous_timeout_ms;
    config.timeout_ms = timeout_ms;
    fsdp_comm_t* comm = nullptr;
    check(fsdp_comm_init_shm(&config, &comm), "cannot set up the communicator '" + job + "'");
    return Communicator(comm);
  }

  /// On collectives that the program lends; `callbacks` is copied, what `user_data` stands for is
  /// used until its `release` is called. See fsdp_comm_init_host. Collective; throws what that says.
  static Communicator host(const fsdp_host_comm_config_t& config,
                           const fsdp_host_collectives_t& callbacks, void* user_data) {
    fsdp_comm_t* comm = nullptr;
    check(fsdp_comm_init_host(&config, &callbacks, user_data, &comm),
          "cannot set up the communicator on the host's collectives");
    return Communicator(comm);
  }

  /// Takes over a C handle; it is destroyed with the last copy of the result. Local.
  static Communicator adopt(fsdp_comm_t* comm) { return Communicator(comm); }

  /// This process's number, 0 to world_size() - 1. Local.
  int rank() const {
    std::int32_t value = 0;
    check(fsdp_comm_rank(get(), &value));
    return value;
  }

  /// How many ranks there are. Local.
  int world_size() const {
    std::int32_t value = 0;
    check(fsdp_comm_world_size(get(), &value));
    return value;
  }

  /// Returns when every rank has called it. Collective.
  void barrier() const { check(fsdp_comm_barrier(get()), "barrier"); }

  /// Combines `count` elements of all ranks in place; every rank receives the same bits, summed in
  /// rank order. T is float, double, int32_t or int64_t. Collective.
  template <class T>
  void all_reduce(T* data, std::int64_t count, ReduceOp op) const {
    all_reduce(TensorView(data, {count}), op);
  }

  /// As above, for a tensor of any type that has a TensorAccess. Collective.
  template <class Tensor>
  void all_reduce(const Tensor& tensor, ReduceOp op) const {
    all_reduce(TensorAccess<Tensor>::view(tensor), op);
  }

  /// As above, for a described tensor. Collective.
  void all_reduce(const TensorView& tensor, ReduceOp op) const {
    const fsdp_tensor_t c_tensor = tensor.c_tensor();
    check(fsdp_comm_all_reduce(get(), &c_tensor, static_cast<std::int32_t>(op)), "all_reduce");
  }

  /// Copies rank `root`'s `count` elements into every other rank's. Collective.
  template <class T>
  void broadcast(T* data, std::int64_t count, int root) const {
    broadcast(TensorView(data, {count}), root);
  }

  /// As above, for a tensor of any type that has a TensorAccess. Collective.
  template <class Tensor>
  void broadcast(const Tensor& tensor, int root) const {
    broadcast(TensorAccess<Tensor>::view(tensor), root);
  }

  /// As above, for a described tensor. Collective.
  void broadcast(const TensorView& tensor, int root) const {
    const fsdp_tensor_t c_tensor = tensor.c_tensor();
    check(fsdp_comm_broadcast(get(), &c_tensor, root), "broadcast");
  }

  /// Lays the ranks' `input` end to end, in rank order, in `output` of world_size() times as many
  /// elements. Collective.
  void all_gather(const TensorView& input, const TensorView& output) const {
    const fsdp_tensor_t c_input = input.c_tensor();
    const fsdp_tensor_t c_output = output.c_tensor();
    check(fsdp_comm_all_gather(get(), &c_input, &c_output), "all_gather");
  }

  /// Combines the ranks' `input` and leaves this rank's even cut of the result in `output`.
  /// Collective.
  void reduce_scatter(const TensorView& input, const TensorView& output, ReduceOp op) const {
    const fsdp_tensor_t c_input = input.c_tensor();
    const fsdp_tensor_t c_output = output.c_tensor();
    check(fsdp_comm_reduce_scatter(get(), &c_input, &c_output, static_cast<std::int32_t>(op)),
          "reduce_scatter");
  }

  /// A communicator of the ranks that give the same `color` (0 or more), in the order of (`key`,
  /// rank). It is independent of this one and may be used in another thread. Collective.
  Communicator split(int color, int key) const {
    fsdp_comm_t* part = nullptr;
    check(fsdp_comm_split(get(), color, key, &part), "split");
    return Communicator(part);
  }

  /// Makes every rank's pending and later calls fail, naming this rank and `reason`. Local.
  void abort(const std::string& reason) const {
    check(fsdp_comm_abort(get(), reason.c_str()), "abort");
  }

  /// The C handle, owned by this object; null when empty.
  fsdp_comm_t* get() const noexcept { return handle_.get(); }

  /// Whether there is a communicator behind this object.
  explicit operator bool() const noexcept { return handle_ != nullptr; }

 private:
  explicit Communicator(fsdp_comm_t* comm) : handle_(comm, fsdp_comm_destroy) {}

  std::shared_ptr<fsdp_comm_t> handle_;
};

}  // namespace fsdp
