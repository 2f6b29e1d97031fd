// A model of 1 GiB on the meta device, on 4 ranks: one unit's parameters exist at a time.
//
// Break: two_units_at_once.
#include <fstream>

#include "scenario.hpp"

namespace scenario_meta_memory {
namespace {

using namespace scenario;
namespace nn = torch::nn;

constexpr std::int64_t kUnits = 16;
constexpr std::int64_t kUnitBytes = std::int64_t{64} << 20;

/// This process's private memory.
std::int64_t private_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    if (word != "RssAnon:") continue;
    std::int64_t kib = 0;
    status >> kib;
    return kib * 1024;
  }
  throw Failure("no RssAnon in /proc/self/status");
}

std::int64_t private_peak = 0;

struct BlockImpl : nn::Module, fsdp::Resettable {
  explicit BlockImpl(float value)
      : value(value),
        weight(register_parameter("weight",
                                  torch::empty({kUnitBytes / 4}, at::TensorOptions(at::kMeta)))) {}
  void reset_parameters() override {
    weight.fill_(value);
    private_peak = std::max(private_peak, private_bytes());
  }
  const float value;
  at::Tensor weight;
};
TORCH_MODULE(Block);

/// A model of 1 GiB: sharding it takes the private memory of its largest unit, on every rank.
void one_unit_at_a_time(const fsdp::Communicator& comm) {
  nn::ModuleList module;
  for (std::int64_t i = 0; i < kUnits; ++i) module->push_back(Block(static_cast<float>(i + 1)));
  fsdp::ShardOptions options;
  options.comm = comm;
  options.wrap = fsdp::wrap_if([&](const nn::Module& each, const std::string&) {
    // With the break, the last two are left to the root together.
    return !broken("two_units_at_once") ||
           each.as<BlockImpl>()->value <= static_cast<float>(kUnits - 2);
  });
  const std::int64_t before = private_bytes();
  auto model = fsdp::fully_shard(module, options);
  const std::int64_t peak = private_peak - before;
  if (comm.rank() == 0) {
    std::printf("a model of %lld MiB: at most %lld MiB of full parameters, %lld MiB measured\n",
                static_cast<long long>(kUnits * kUnitBytes >> 20),
                static_cast<long long>(model.stats().materialized_peak_bytes >> 20),
                static_cast<long long>(peak >> 20));
  }
  REQUIRE_SAY(model.stats().materialized_peak_bytes == static_cast<std::uint64_t>(kUnitBytes),
              model.stats().materialized_peak_bytes << " bytes");
  REQUIRE_SAY(peak >= kUnitBytes && peak < kUnitBytes + kUnitBytes / 2, peak << " bytes");
  const torch::NoGradGuard no_grad;
  for (std::size_t i = 0; i < model.parameters().size(); ++i) {
    const at::Tensor shard = model.parameters()[i];
    REQUIRE(shard.numel() == 0 || shard.eq(static_cast<double>(i + 1)).all().item<bool>());
  }
}

int run_program(int argc, char** argv) {
  return main_of(argc, argv, {{"1 GiB, one unit at a time", one_unit_at_a_time}});
}

const harness::Program program("scenario_meta_memory", run_program);

}  // namespace
}  // namespace scenario_meta_memory
