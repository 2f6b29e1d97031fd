// Mixed precision of sharded models, bit for bit against an unsharded module in which the same
// rounding is done by hand: float32 masters, parameters and inputs in 16 bits, gradients widened,
// rounded to the reduce dtype, and averaged over the ranks in float32.
#include "precision_trial.hpp"

namespace feature_precision {
namespace {

using namespace precision;

// ---- a whole model in 16 bits ----

void mlp(const fsdp::Communicator& comm) {
  for (const auto type : {at::kBFloat16, at::kHalf}) {
    for (const bool reduce_wide : {false, true}) {
      auto [module, reference] = twins<Mlp>();
      auto options = options_of(comm, fsdp::wrap_class("LinearImpl"));
      options.mixed_precision.param_dtype = type;
      if (reduce_wide) options.mixed_precision.reduce_dtype = at::kFloat;
      options.mixed_precision.output_dtype = at::kFloat;
      train_and_compare(comm, module, reference, options,
                        {type, {}, all_in(reduce_wide ? at::kFloat : type)}, vectors(type));
    }
  }
}

void transformer(const fsdp::Communicator& comm) {
  for (const auto type : {at::kBFloat16, at::kHalf}) {
    auto [module, reference] = twins<Transformer>();
    auto options = options_of(comm, fsdp::wrap_class("BlockImpl"));
    options.mixed_precision.param_dtype = type;
    options.mixed_precision.output_dtype = at::kFloat;
    options.strategy =
        type == at::kHalf ? fsdp::Strategy::shard_grad_op : fsdp::Strategy::full_shard;
    train_and_compare(comm, module, reference, options, {type, {}, all_in(type)}, tokens_of);
    // The tied parameter is one tensor still, of the root's unit.
    REQUIRE(module->head->weight.is_same(module->embed->weight));
  }
}

/// Gradients of large weights, which are copied past the cache; and what slots for them take.
void large_weights(const fsdp::Communicator& comm) {
  for (const auto type : {at::kBFloat16, at::kHalf}) {
    const auto large = [] {
      torch::manual_seed(7);
      return Mlp(256);
    };
    const auto input = [type](int step, int rank, bool by_hand) {
      const at::Tensor x = batch_of(step, rank, {8, 256});
      return by_hand ? x.to(type) : x;
    };
    auto options = options_of(comm, fsdp::wrap_class("LinearImpl"));
    options.mixed_precision.param_dtype = type;
    options.mixed_precision.output_dtype = at::kFloat;
    train_and_compare(comm, large(), large(), options, {type, {}, all_in(type)}, input);

    Mlp module = large();
    auto model = fsdp::fully_shard(module, options);
    Mlp planned = large();
    const auto ranks = static_cast<std::uint32_t>(comm.world_size());
    const auto plan = fsdp::plan(*planned, options, ranks, 0);
    REQUIRE(plan.gradient_slot_bytes == model.stats().gradient_slot_bytes);
    // first, last and the root (a vector each of 769): two bytes an element, and padding.
    REQUIRE(plan.gradient_slot_bytes < 3 * (769 * 257 + 5 * 770 + 2 * 769));
  }
}

/// What micro-batches leave unsharded is summed in float32, whatever it is reduced in.
void accumulated(const fsdp::Communicator& comm) {
  constexpr int kMicroBatches = 3;
  for (const auto reduce : {at::kBFloat16, at::kFloat}) {
    auto [module, reference] = twins<Mlp>();
    const auto input = vectors(at::kBFloat16);
    Masters full(*reference, at::kBFloat16, {});
    for (int rank = 0; rank < comm.world_size(); ++rank) {
      std::vector<at::Tensor> own(full.params.size());
      for (int micro = 0; micro < kMicroBatches; ++micro) {
        full.round();
        const at::Tensor output = reference->forward(input(micro, rank, true)).to(at::kFloat);
        (output * output).mean().backward();
        for (std::size_t i = 0; i < own.size(); ++i) {
          const at::Tensor grad = full.params[i].grad().to(at::kFloat);
          own[i] = micro == 0 ? grad : own[i] + grad;
        }
      }
      for (std::size_t i = 0; i < own.size(); ++i) {
        at::Tensor& mean = full.masters[i].mutable_grad();
        const at::Tensor term = own[i].to(reduce).to(at::kFloat);
        mean = rank == 0 ? term : mean + term;
      }
    }
    for (const at::Tensor& master : full.masters) master.mutable_grad() /= comm.world_size();

    auto options = options_of(comm, fsdp::wrap_class("LinearImpl"));
    options.mixed_precision.param_dtype = at::kBFloat16;
    options.mixed_precision.reduce_dtype = reduce;
    options.mixed_precision.output_dtype = at::kFloat;
    auto model = fsdp::fully_shard(module, options);
    const auto backward = [&](int micro) {
      const at::Tensor output = model.forward(input(micro, comm.rank(), false));
      (output * output).mean().backward();
    };
    {
      const auto quiet = model.no_sync();
      for (int micro = 0; micro + 1 < kMicroBatches; ++micro) backward(micro);
    }
    backward(kMicroBatches - 1);
    check_shards(model, full.masters, true, "after three micro-batches");
  }
}

/// The embedding and the head are units of their own; their one weight belongs to the root.
void tied_across_units(const fsdp::Communicator& comm) {
  auto [module, reference] = twins<Transformer>();
  auto options = options_of(comm, fsdp::wrap_if([](const nn::Module&, const std::string& name) {
                              return name == "embed" || name == "head" || name == "blocks.1";
                            }));
  options.mixed_precision.param_dtype = at::kBFloat16;
  options.mixed_precision.reduce_dtype = at::kHalf;
  options.mixed_precision.output_dtype = at::kFloat;
  train_and_compare(comm, module, reference, options, {at::kBFloat16, {}, all_in(at::kHalf)},
                    tokens_of);
}

// ---- overrides ----

/// The weights of normalizations stay in float32 inside units in bfloat16.
void parameters_of_their_own(const fsdp::Communicator& comm) {
  auto [module, reference] = twins<Transformer>();
  auto options = options_of(comm, fsdp::wrap_class("BlockImpl"));
  options.mixed_precision.param_dtype = at::kBFloat16;
  options.mixed_precision.output_dtype = at::kFloat;
  Types own;
  for (const auto& item : module->named_parameters()) {
    if (item.key().find("norm") != std::string::npos) own[item.key()] = at::kFloat;
  }
  REQUIRE(own.size() == 8);
  options.param_dtypes = own;
  train_and_compare(comm, module, reference, options,
                    {at::kBFloat16, own, all_in(at::kBFloat16)}, tokens_of);
}

/// One block in float32, one in float16, the rest in bfloat16: inputs follow.
void units_of_their_own(const fsdp::Communicator& comm) {
  auto [module, reference] = twins<Transformer>();
  auto options = options_of(comm, fsdp::wrap_class("BlockImpl"));
  options.mixed_precision.param_dtype = at::kBFloat16;
  options.mixed_precision.output_dtype = at::kFloat;
  options.unit_mixed_precision["blocks.0"].param_dtype = at::kFloat;
  options.unit_mixed_precision["blocks.1"].param_dtype = at::kHalf;
  options.unit_mixed_precision["blocks.1"].reduce_dtype = at::kFloat;
  Types own;
  for (const auto& item : module->named_parameters()) {
    if (item.key().rfind("blocks.0", 0) == 0) own[item.key()] = at::kFloat;
    if (item.key().rfind("blocks.1", 0) == 0) own[item.key()] = at::kHalf;
  }
  reference->block(0).in = to_type(at::kFloat);
  reference->block(1).in = to_type(at::kHalf);
  reference->in = to_type(at::kBFloat16);
  const auto reduce = [](const std::string& name) {
    return name.rfind("blocks.", 0) == 0 ? at::kFloat : at::kBFloat16;
  };
  train_and_compare(comm, module, reference, options, {at::kBFloat16, own, reduce}, tokens_of);
}

/// Types as registered, several of them in one unit; nothing is cast.
void registered_types(const fsdp::Communicator& comm) {
  for (const bool wrapped : {false, true}) {
    auto [module, reference] = twins<Mlp>();
    for (Mlp net : {module, reference}) {
      net->first->to(at::kBFloat16);
      net->last->to(at::kHalf);
      net->in = [calls = std::make_shared<std::size_t>(0)](const at::Tensor& x) {
        static constexpr at::ScalarType types[] = {at::kBFloat16, at::kFloat, at::kHalf};
        return x.to(types[(*calls)++ % 3]);
      };
    }
    auto options = options_of(comm, wrapped ? fsdp::wrap_class("LinearImpl") : fsdp::WrapPolicy());
    options.mixed_precision.output_dtype = at::kFloat;
    train_and_compare(comm, module, reference, options, {std::nullopt, {}, all_in(at::kFloat)},
                      vectors(at::kFloat));
  }
}

/// Each of two groups of ranks has copies of its own.
void hybrid(const fsdp::Communicator& comm) {
  if (comm.world_size() != 4) return;
  auto [module, reference] = twins<Mlp>();
  auto options = options_of(comm, fsdp::wrap_class("LinearImpl"));
  options.strategy = fsdp::Strategy::hybrid_shard;
  options.shard_size = 2;
  options.mixed_precision.param_dtype = at::kBFloat16;
  options.mixed_precision.reduce_dtype = at::kFloat;
  options.mixed_precision.output_dtype = at::kFloat;
  Masters full(*reference, at::kBFloat16, {});
  auto model = fsdp::fully_shard(module, options);
  auto optimizer = sgd()(model.parameters());
  auto full_optimizer = sgd()(full.masters);
  const auto input = vectors(at::kBFloat16);
  const std::vector<at::ScalarType> reduce(full.names.size(), at::kFloat);
  for (int step = 0; step < 3; ++step) {
    at::Tensor wanted;
    full.average(comm.world_size(), reduce, [&](int rank) {
      const at::Tensor output = reference->forward(input(step, rank, true)).to(at::kFloat);
      (output * output).mean().backward();
      if (rank == comm.rank()) wanted = output.detach();
    });
    const at::Tensor output = model.forward(input(step, comm.rank(), false));
    // Gradients are summed group by group, so later masters may differ in their last bits.
    const double tolerance = step == 0 ? 0 : 2e-2;
    REQUIRE(torch::allclose(output.detach(), wanted, tolerance, tolerance));
    (output * output).mean().backward();
    optimizer->step();
    full_optimizer->step();
    check_shards(model, full.masters, false, "hybrid", 1e-2);
    model.zero_grad();
    full_optimizer->zero_grad();
  }
}

int run_program(int argc, char** argv) {
  return harness::main_of(argc, argv,
                          {{"mlp", mlp},
                           {"transformer", transformer},
                           {"large weights", large_weights},
                           {"accumulated", accumulated},
                           {"tied across units", tied_across_units},
                           {"parameters of their own", parameters_of_their_own},
                           {"units of their own", units_of_their_own},
                           {"registered types", registered_types},
                           {"hybrid", hybrid}});
}

const harness::Program program("feature_precision", run_program);

}  // namespace
}  // namespace feature_precision
