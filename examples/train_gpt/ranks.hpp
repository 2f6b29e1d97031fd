// The ranks that train together; with --no-shard just this process.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <fsdp/torch.hpp>
#include <string>
#include <vector>

#include "mpi.hpp"
#include "options.hpp"

class Ranks {
 public:
  /// From the launcher's environment, or with --comm mpi from MPI. Collective; throws fsdp::Error
  /// naming who is missing, or what keeps the device from being used. With --no-shard, no
  /// communicator is made; throws UsageError when a launcher started several ranks.
  explicit Ranks(const Options& options) : device_(device_of(options)) {
    if (!options.no_shard) {
      comm_ = options.comm == "mpi" ? mpi_world() : fsdp::Communicator::from_env();
      rank_ = comm_.rank();
      world_size_ = comm_.world_size();
      return;
    }
    for (const char* name : {"WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS", "PMI_SIZE"}) {
      const char* value = std::getenv(name);
      if (value != nullptr && std::string(value) != "1") {
        throw UsageError("--no-shard trains on one rank, but " + std::string(name) + " is " +
                         value);
      }
    }
  }

  int rank() const { return rank_; }
  int world_size() const { return world_size_; }
  bool first() const { return rank_ == 0; }
  const fsdp::Communicator& communicator() const { return comm_; }
  /// Where this rank computes.
  at::Device device() const { return device_; }

  /// Returns when every rank has called it. Collective.
  void barrier() {
    if (comm_) comm_.barrier();
  }

  /// The sums over all ranks, the same bits on each. Collective.
  std::vector<double> sum(std::vector<double> values) {
    if (comm_)
      comm_.all_reduce(values.data(), static_cast<std::int64_t>(values.size()),
                       fsdp::ReduceOp::sum);
    return values;
  }

  /// Ends the other ranks' waiting with an error that names this rank and `reason`. Local, does not
  /// throw.
  void abort(const std::string& reason) noexcept {
    try {
      if (comm_) comm_.abort(reason);
    } catch (const std::exception&) {
      // The communicator has failed already, and the other ranks know.
    }
  }

 private:
  /// What --device says; "cuda" is the GPU of the rank's number on its host, as the launcher says.
  static at::Device device_of(const Options& options) {
    at::Device device(options.device);
    if (device.is_cpu()) return device;
    fsdp::load_cuda();
    for (const char* name :
         {"LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"}) {
      const char* value = std::getenv(name);
      if (device.has_index() || value == nullptr) continue;
      device.set_index(static_cast<at::DeviceIndex>(std::atoi(value)));
    }
    return fsdp::usable_device(device);
  }

  at::Device device_;
  fsdp::Communicator comm_;
  int rank_ = 0, world_size_ = 1;
};
