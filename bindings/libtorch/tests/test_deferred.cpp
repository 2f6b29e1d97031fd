// Deferred construction gives the values of eager construction, bit by bit and in any order: every
// initializer, layers, and what constructors compute.
#include <ATen/ScalarOps.h>

#include "deferred.hpp"

namespace test_deferred {
namespace {

using namespace harness;
namespace nn = torch::nn;
namespace init = torch::nn::init;

const std::vector<std::int64_t> kCounts = {1, 5, 15, 16, 17, 1000, 100003};

void check_init(const std::string& name, const std::vector<std::int64_t>& sizes,
                const std::function<void(at::Tensor)>& initialize) {
  check_same(c10::str(name, at::IntArrayRef(sizes)), made([&](Made& module) {
               initialize(module.register_parameter("w", torch::empty(sizes)));
             }));
}

void initializers(const fsdp::Communicator&) {
  for (const std::int64_t n : kCounts) {
    check_init("constant_", {n}, [](at::Tensor w) { init::constant_(w, 0.3); });
    check_init("ones_", {n}, [](at::Tensor w) { init::ones_(w); });
    check_init("zeros_", {n}, [](at::Tensor w) { init::zeros_(w); });
    check_init("normal_", {n}, [](at::Tensor w) { init::normal_(w, 0.1, 0.02); });
    check_init("uniform_", {n}, [](at::Tensor w) { init::uniform_(w, -0.1, 0.1); });
    for (const auto& sizes : {std::vector<std::int64_t>{n, 1}, {1, n}}) {
      check_init("eye_", sizes, [](at::Tensor w) { init::eye_(w); });
      check_init("orthogonal_", sizes, [](at::Tensor w) { init::orthogonal_(w, 1.5); });
    }
    check_init("dirac_", {n, 2, 3}, [](at::Tensor w) { init::dirac_(w); });
    check_init("sparse_", {n, 3}, [](at::Tensor w) { init::sparse_(w, 0.4, 0.02); });
    check_init("kaiming_normal_", {n, 3}, [](at::Tensor w) { init::kaiming_normal_(w); });
    check_init("kaiming_uniform_", {n, 3},
               [](at::Tensor w) { init::kaiming_uniform_(w, std::sqrt(5)); });
    check_init("xavier_normal_", {n, 3}, [](at::Tensor w) { init::xavier_normal_(w); });
    check_init("xavier_uniform_", {n, 3}, [](at::Tensor w) { init::xavier_uniform_(w, 0.5); });
  }
  check_init("orthogonal_", {17, 9}, [](at::Tensor w) { init::orthogonal_(w); });
  check_init("orthogonal_", {9, 3, 7}, [](at::Tensor w) { init::orthogonal_(w); });
  check_init("sparse_", {17, 40}, [](at::Tensor w) { init::sparse_(w, 0.9); });
  check_init("dirac_", {6, 4, 3, 3}, [](at::Tensor w) { init::dirac_(w); });
}

void layers(const fsdp::Communicator&) {
  // torch::tensor() makes real tensors, as num_batches_tracked is.
  const auto check = [](const std::string& name, const auto& make) {
    check_same(name, make, /*all_deferred=*/false);
  };
  for (const std::int64_t n : {1, 5, 15, 16, 17, 1000}) {
    check(c10::str("Linear", n), [&] { return nn::Linear(n, 3).ptr(); });
    check(c10::str("Linear without bias", n),
          [&] { return nn::Linear(nn::LinearOptions(3, n).bias(false)).ptr(); });
    check(c10::str("Bilinear", n), [&] { return nn::Bilinear(n, 2, 3).ptr(); });
    check(c10::str("Conv1d", n), [&] { return nn::Conv1d(n, 3, 3).ptr(); });
    check(c10::str("Conv2d", n), [&] { return nn::Conv2d(3, n, 3).ptr(); });
    check(c10::str("ConvTranspose2d", n), [&] { return nn::ConvTranspose2d(n, 2, 3).ptr(); });
    check(c10::str("BatchNorm1d", n), [&] { return nn::BatchNorm1d(n).ptr(); });
    check(c10::str("LayerNorm", n),
          [&] { return nn::LayerNorm(nn::LayerNormOptions({n, 2})).ptr(); });
    check(c10::str("GroupNorm", n), [&] { return nn::GroupNorm(1, n).ptr(); });
    check(c10::str("Embedding", n),
          [&] { return nn::Embedding(nn::EmbeddingOptions(n, 3).padding_idx(0)).ptr(); });
    check(c10::str("PReLU", n),
          [&] { return nn::PReLU(nn::PReLUOptions().num_parameters(n)).ptr(); });
    check(c10::str("GRU", n), [&] { return nn::GRU(n, 3).ptr(); });
    check(c10::str("RNN", n), [&] { return nn::RNN(3, n < 100 ? n : 100).ptr(); });
    check(c10::str("LSTM", n), [&] {
      return nn::LSTM(nn::LSTMOptions(n, 3).num_layers(2).bidirectional(true).proj_size(2)).ptr();
    });
    check(c10::str("MultiheadAttention", n), [&] {
      return nn::MultiheadAttention(nn::MultiheadAttentionOptions(n, 1).add_bias_kv(true)).ptr();
    });
  }
  check("MultiheadAttention with other sizes", [] {
    return nn::MultiheadAttention(nn::MultiheadAttentionOptions(6, 2).kdim(5).vdim(7)).ptr();
  });
  check("Transformer", [] {
    return nn::Transformer(nn::TransformerOptions(6, 2, 2, 1).dim_feedforward(11)).ptr();
  });
  check("Sequential", [] {
    nn::Sequential stack(nn::Linear(4, 5), nn::ReLU(), nn::BatchNorm1d(5), nn::Linear(5, 4));
    return stack.ptr();
  });
  check("ModuleList", [] {
    nn::ModuleList list;
    for (int i = 0; i < 3; ++i) list->push_back(nn::Linear(4, 4));
    return list.ptr();
  });
  check("weight tying", made([](Made& module) {
          nn::Linear in = module.register_module("in", nn::Linear(4, 6));
          nn::Linear out = module.register_module("out", nn::Linear(4, 6));
          out->weight = out->register_parameter("tied", in->weight);
          REQUIRE(out->weight.is_same(in->weight));
        }));
}

/// Registers what `compute` returns as buffer `name`.
struct Computed {
  const char* name;
  std::function<at::Tensor()> compute;
};

at::Tensor with_generator(const std::function<void(at::Generator)>& draw, const at::Tensor& w) {
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(11);
  draw(generator);
  return at::stack({w.flatten()[0], torch::randn({1}, generator)[0]});
}

std::vector<Computed> random_expressions(std::int64_t n) {
  const auto empty = [n] { return torch::empty({n}); };
  const auto square = [n] { return torch::empty({n, 3}); };
  return {
      {"randn", [=] { return torch::randn({n, 2}) * 0.02; }},
      {"rand", [=] { return 1 - 2 * torch::rand({n}); }},
      {"double", [=] { return torch::randn({n}, torch::kDouble).to(torch::kFloat); }},
      {"half", [=] { return torch::randn({n}, torch::kHalf); }},
      {"bfloat16", [=] { return torch::rand({n}, torch::kBFloat16); }},
      {"complex", [=] { return torch::randn({n}, torch::kComplexFloat); }},
      {"randn_like", [=] { return torch::randn_like(torch::zeros({n, 2}).t()); }},
      {"rand_like", [=] { return torch::rand_like(torch::zeros({n})).add_(torch::rand({n})); }},
      {"transposed", [=] { return square().t().normal_(); }},
      {"narrow", [=] { return torch::zeros({n, 3}).narrow(1, 1, 2).normal_(); }},
      {"step", [=] { return torch::zeros({2 * n}).slice(0, 0, 2 * n, 2).uniform_(); }},
      {"row", [=] { return torch::ones({3, n})[1].normal_(1, 2); }},
      {"exponential_", [=] { return empty().exponential_(2); }},
      {"log_normal_", [=] { return empty().log_normal_(); }},
      {"cauchy_", [=] { return empty().cauchy_(); }},
      {"geometric_", [=] { return empty().geometric_(0.3); }},
      {"random_", [=] { return torch::empty({n}, torch::kLong).random_(100); }},
      {"bernoulli_", [=] { return empty().bernoulli_(0.3); }},
      {"bernoulli", [=] { return torch::bernoulli(torch::rand({n})); }},
      {"normal", [=] { return at::normal(torch::rand({n}), torch::ones({n})); }},
      {"poisson", [=] { return torch::poisson(torch::rand({n}) * 20); }},
      {"multinomial", [=] { return torch::multinomial(torch::rand({n}), 3, true); }},
      {"dropout", [=] { return torch::dropout(torch::ones({n}), 0.4, true); }},
      {"randint", [=] { return torch::randint(1000, {n}) + torch::zeros({n}); }},
      {"randperm", [=] { return torch::randn({n}).index_select(0, torch::randperm(n)); }},
      {"truncated", [=] { return empty().uniform_(-0.9, 0.9).erfinv_().mul_(0.02).clamp_(-1, 1); }},
      {"manual_seed",
       [=] {
         torch::manual_seed(42);
         return square().normal_();
       }},
      {"generator",
       [=] {
         const at::Tensor w = square();
         return with_generator(
             [&](at::Generator g) { w.normal_(0, 1, g).t().uniform_(0, 1, g); }, w);
       }},
      {"generator of exponential_",
       [=] {
         const at::Tensor w = square();
         return with_generator([&](at::Generator g) { w.exponential_(1, g); }, w);
       }},
      {"default type",
       [=] {
         c10::set_default_dtype(caffe2::TypeMeta::Make<double>());
         const at::Tensor w = torch::randn({n});
         c10::set_default_dtype(caffe2::TypeMeta::Make<float>());
         return w;
       }},
  };
}

void random_operators(const fsdp::Communicator&) {
  for (const std::int64_t n : {1, 5, 15, 16, 17, 40, 1000, 65536, 65545, 100003}) {
    check_same(c10::str("random operators of ", n), made([&](Made& module) {
                 for (const Computed& item : random_expressions(n)) {
                   std::string name = item.name;
                   std::replace(name.begin(), name.end(), '.', '_');
                   module.register_buffer(name, item.compute());
                 }
               }));
  }
}

void views_and_writes(const fsdp::Communicator&) {
  check_same("views and writes", made([](Made& module) {
    const torch::NoGradGuard no_grad;
    at::Tensor w = module.register_parameter("w", torch::randn({6, 4}));
    w.narrow(0, 1, 2).zero_();
    w[0].fill_(3);
    w[4][1] = 7.5;
    w.index_put_({torch::indexing::Slice(2, 4), 1}, torch::rand({2}));
    w.index_put_({w > 2}, -1);  // a mask: the meta kernel cannot say how many
    w.masked_fill_(w < -0.5, 0.25);
    const at::Tensor before = w.clone();
    at::Tensor copied = module.register_buffer("copied", torch::empty({6, 4}));
    copied.copy_(w);
    w.t().add_(torch::arange(6)).mul_(w.sum(0, true).t());
    module.register_buffer("before", before);
    // Written after it was read, and read after it was written.
    at::Tensor total = module.register_buffer("total", torch::zeros({4}));
    for (int i = 0; i < 6; ++i) {
      total += w[i];
      w[i].copy_(total);
    }
    at::Tensor weight = module.register_parameter("weight", torch::empty({3, 3}));
    weight.copy_(w.slice(0, 0, 3).slice(1, 0, 3));
    weight.div_(weight.norm());
    const auto parts = torch::randn({3, 6}).chunk(3, 1);
    module.register_buffer("part", parts[1]);
    const at::Tensor column = torch::stack({total}).t().slice(0, 0, 3);
    module.register_buffer("joined", torch::cat({parts[2], parts[0], column}, 1));
    at::Tensor turned = module.register_buffer("turned", torch::randn({2, 5}));
    turned.t_().unsqueeze_(0);
    turned[0][3].fill_(9);
    at::Tensor grown = module.register_buffer("grown", torch::ones({3}));
    grown.resize_({5}).slice(0, 3, 5).fill_(2);
    at::Tensor out = module.register_buffer("out", torch::empty({0}));
    torch::add_out(out, total, total);
    module.register_buffer("double", w.to(torch::kDouble).to(torch::kCPU));
    module.register_buffer("halves", w.view(-1).to(torch::kHalf).contiguous().view({2, 12}));
    module.register_buffer("conjugate", torch::view_as_complex(torch::randn({3, 2})).conj());
    module.register_buffer("imaginary",
                           torch::imag(torch::randn({3}, torch::kComplexFloat).conj()));
    module.register_buffer("expanded", torch::randn({1, 4}).expand({3, 4}));
    at::_foreach_mul_({total, copied}, 0.5);
    at::Tensor swapped = module.register_buffer("swapped", torch::zeros({4}));
    swapped.set_data(torch::rand({4}));
    module.register_buffer("nothing", torch::empty({0, 3}));
  }));
  check_same("functions", made([](Made& module) {
    const at::Tensor position = torch::arange(0, 20, torch::kFloat).unsqueeze(1);
    const at::Tensor scale = torch::exp(torch::arange(0, 6, 2) * (-std::log(10000.0) / 6));
    at::Tensor table = torch::zeros({20, 6});
    table.slice(1, 0, 6, 2).copy_(torch::sin(position * scale));
    table.slice(1, 1, 6, 2).copy_(torch::cos(position * scale));
    module.register_buffer("table", table);
    module.register_buffer("mask", torch::triu(torch::full({7, 7}, -INFINITY), 1));
    module.register_buffer("causal", torch::ones({7, 7}, torch::kBool).tril());
    module.register_buffer("linspace", torch::linspace(0, 0.1, 13).pow(2));
    module.register_buffer("outer", torch::outer(torch::randn({5}), torch::randn({3})));
    module.register_buffer("softmax", torch::softmax(torch::randn({4, 9}), 1));
    module.register_buffer("product", torch::randn({9, 7}).matmul(torch::randn({7, 5})));
    module.register_buffer("sorted", std::get<0>(torch::sort(torch::randn({33}))));
    module.register_buffer("where", torch::where(torch::rand({9}) > 0.5, torch::ones({9}), 0));
    module.register_buffer("svd", std::get<0>(torch::linalg_svd(torch::randn({6, 4}), false)));
    module.register_buffer(
        "added", table.index_add(0, torch::tensor({3, 1}), torch::ones({2, 6})));
    module.register_buffer("like", torch::ones_like(table) + table.new_full({6}, 2.5) +
                                       torch::zeros({6}, table.options()));
    module.register_parameter("scaled", torch::randn({4, 4}) * std::sqrt(2.0 / 4));
    module.register_parameter("frozen", torch::randn({4}), /*requires_grad=*/false);
  }));
}

void real_inputs(const fsdp::Communicator&) {
  const at::Tensor outer = torch::arange(12, torch::kFloat).view({3, 4}).t();
  check_same("real tensors", made([&](Made& module) {
    std::vector<float> values = {1, 2, 3, 4};
    module.register_buffer("blob", torch::zeros({4}) + torch::from_blob(values.data(), {4}));
    values.assign(4, -1);  // recorded by value
    module.register_buffer("list", torch::tensor({1., 2.}) * torch::ones({2}));
    module.register_buffer("nested", torch::tensor({{1., 2.}, {3., 4.}}) + torch::zeros({2, 2}));
    module.register_buffer("vector",
                           torch::tensor(std::vector<double>{1, 2, 3}) + torch::zeros({3}));
    module.register_buffer("scalar", torch::tensor(3) * torch::ones({2}, torch::kLong));
    module.register_buffer("outer", outer.contiguous().add(torch::zeros({4, 3})));
    // A number, which does not make integers double.
    module.register_buffer(
        "number", torch::arange(3).mul(at::native::wrapped_scalar_tensor(2.5)));
    // The copy that is recorded is laid out differently, so the result would be.
    const at::Tensor wide = torch::randn({6, 4}).t();
    module.register_buffer("expanded", outer.slice(1, 0, 1).expand({4, 6}) + wide);
    module.register_buffer("rows", torch::cat({outer, torch::randn({1, 3})}));
    module.register_buffer("picked", torch::randn({9}).index_select(0, torch::tensor({4, 0, 8})));
    // A view or copy of a real tensor is one; drawing into it is eager.
    REQUIRE(!fsdp::is_deferred(outer.view_as(torch::zeros({4, 3}))));
    REQUIRE(outer.reshape_as(torch::zeros({4, 3})).sum().item<float>() == 66);
    module.register_buffer("drawn", torch::zeros({4, 3}).add(outer.clone().normal_()));
    REQUIRE(!fsdp::is_deferred(torch::tensor(std::vector<float>(1000, 1.f))));
    REQUIRE(torch::tensor(2.5).item<float>() == 2.5f);
    REQUIRE(torch::randperm(9).sum().item<int>() == 36);
  }));
  check_same("real buffers", made([&](Made& module) {
               module.register_parameter("w", torch::randn({3}));
               module.register_buffer("real", torch::tensor({1., 2.}));
               module.register_buffer("permutation", torch::randperm(7));
             }),
             /*all_deferred=*/false);
}

/// Random programs over a few tensors that are views of each other or not.
void programs(const fsdp::Communicator&) {
  const torch::NoGradGuard no_grad;
  for (unsigned seed = 0; seed < 150; ++seed) {
    check_same(c10::str("program ", seed), made([seed](Made& module) {
      std::mt19937 choice(seed);
      const auto pick = [&](std::size_t count) -> std::size_t { return choice() % count; };
      const std::vector<std::int64_t> rows = {1, 3, 5, 16, 41};
      const std::int64_t n = rows[pick(rows.size())];
      std::vector<at::Tensor> pool = {torch::randn({n, 7}), torch::rand({n, 7})};
      const std::vector<std::function<void(at::Tensor&, at::Tensor&)>> steps = {
          [](at::Tensor& a, at::Tensor&) { a.normal_(); },
          [](at::Tensor& a, at::Tensor&) { a.uniform_(-1, 1); },
          [](at::Tensor& a, at::Tensor&) { a.t().normal_(); },
          [](at::Tensor& a, at::Tensor&) { a.exponential_(); },
          [](at::Tensor& a, at::Tensor& b) { a.add_(b, 0.5); },
          [](at::Tensor& a, at::Tensor& b) { a.copy_(b); },
          [](at::Tensor& a, at::Tensor& b) { a = b * 0.5 + 1; },
          [](at::Tensor& a, at::Tensor& b) { a = b.clone(); },
          [](at::Tensor& a, at::Tensor&) { a[0].fill_(2); },
          [](at::Tensor& a, at::Tensor&) { a.narrow(1, 2, 3).mul_(3); },
          [](at::Tensor& a, at::Tensor& b) { a.slice(1, 0, 2).copy_(b.slice(1, 3, 5)); },
          [](at::Tensor& a, at::Tensor& b) { a = b.flip(0); },
          [](at::Tensor& a, at::Tensor& b) { a = torch::where(b > 0, a, b); },
          [](at::Tensor& a, at::Tensor& b) { a = b.slice(0, 0).view(b.sizes()); },  // an alias
          [](at::Tensor& a, at::Tensor&) { a = torch::randn_like(a); },
          [](at::Tensor& a, at::Tensor& b) { a.clamp_(-1, 1).sub_(b.mean()); },
      };
      for (int step = 0; step < 25; ++step) {
        if (pick(5) == 0) pool.push_back(torch::randn({n, 7}));
        const std::size_t a = pick(pool.size());
        const std::size_t b = pick(pool.size());
        // Overlapping arguments of copy_ and add_ are the same tensor or none.
        steps[pick(steps.size())](pool[a], pool[b]);
      }
      for (std::size_t i = 0; i < pool.size(); ++i) {
        module.register_buffer("t" + std::to_string(i), pool[i]);
      }
    }));
  }
}

int run_program(int argc, char** argv) {
  return main_of(argc, argv,
                 {{"initializers", initializers},
                  {"layers", layers},
                  {"random operators", random_operators},
                  {"views and writes", views_and_writes},
                  {"real inputs", real_inputs},
                  {"random programs", programs}});
}

const harness::Program program("test_deferred", run_program);

}  // namespace
}  // namespace test_deferred
