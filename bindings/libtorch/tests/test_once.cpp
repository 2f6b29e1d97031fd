// The dispatcher fallback is registered once, though two translation units and a shared library
// that shares no symbols with the program include the header; sharded and deferred models may cross
// between them.
//
// usage: test_once LIBRARY [RANKS]
#include <dlfcn.h>

#include "once.hpp"

namespace {

template <class Function>
Function* symbol(void* library, const char* name) {
  void* address = dlsym(library, name);
  if (address == nullptr) throw harness::Failure(dlerror());
  return reinterpret_cast<Function*>(address);
}

void run(const char* path, bool library_first, const fsdp::Communicator& comm) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw harness::Failure(dlerror());
  const auto train = symbol<void(const fsdp::Communicator*)>(library, "library_train");
  const auto make = symbol<once::Linear*(const fsdp::Communicator*)>(library, "library_make");
  const auto use = symbol<void(once::Linear*, const fsdp::Communicator*)>(library, "library_use");
  const auto table = symbol<const void*()>(library, "library_table");
  const auto deleter = symbol<const void*()>(library, "library_own_deleter");

  REQUIRE(!c10::Dispatcher::singleton().hasBackendFallbackForDispatchKey(
      c10::DispatchKey::DeferredInit));
  if (library_first) train(&comm);
  auto here = once::make(comm);
  once::train(here, comm);
  once::train_in_second_unit(comm);
  train(&comm);

  // The library really has a copy of its own, and all agree on one table.
  REQUIRE(deleter() != reinterpret_cast<const void*>(&fsdp::detail::release_storage_tag));
  REQUIRE(once::table_of_second_unit() == &fsdp::detail::dispatch_table());
  REQUIRE(table() == &fsdp::detail::dispatch_table());

  // Made there and used here, and the other way round.
  const std::unique_ptr<once::Linear> there(make(&comm));
  once::train(*there, comm);
  auto mine = once::make(comm);
  use(&mine, &comm);
}

/// Deferred on one side, made on the other.
void run_deferred(const char* path, bool library_first) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw harness::Failure(dlerror());
  const auto log = symbol<const void*()>(library, "library_log");
  const auto defer = symbol<torch::nn::Linear*()>(library, "library_defer");
  const auto materialize = symbol<void(torch::nn::Linear*)>(library, "library_materialize");
  const auto defer_here = [] {
    return new torch::nn::Linear(fsdp::deferred_init([] { return torch::nn::Linear(5, 3); }));
  };

  torch::manual_seed(2);
  const torch::nn::Linear expected(5, 3);
  const auto check = [&](const torch::nn::Linear& layer) {
    REQUIRE(!fsdp::is_deferred(*layer));
    REQUIRE(torch::equal(layer->weight, expected->weight));
    REQUIRE(torch::equal(layer->bias, expected->bias));
  };
  for (const bool there : {library_first, !library_first}) {
    torch::manual_seed(2);
    std::unique_ptr<torch::nn::Linear> layer(there ? defer() : defer_here());
    REQUIRE(fsdp::is_deferred(**layer) && !fsdp::is_deferred(torch::ones({2})));
    if (there) {
      fsdp::materialize_module(**layer);
    } else {
      materialize(layer.get());
    }
    check(*layer);
  }
  // A scope opened here is seen by an init function there.
  torch::manual_seed(2);
  std::unique_ptr<torch::nn::Linear> layer(defer_here());
  {
    fsdp::detail::DeferredScope scope;
    for (const at::Tensor& leaf : (*layer)->parameters()) {
      scope.add(leaf, fsdp::detail::deferred_record(leaf));
      fsdp::detail::point_at(leaf, torch::zeros(leaf.sizes()));
    }
    materialize(layer.get());
  }
  check(*layer);
  // Both sides inside one recording.
  torch::manual_seed(2);
  layer.reset(fsdp::deferred_init([&] { return defer(); }));
  REQUIRE(fsdp::is_deferred(**layer));
  materialize(layer.get());
  check(*layer);
  REQUIRE(log() == &fsdp::detail::deferred_log());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s LIBRARY [RANKS]\n", argv[0]);
    return 2;
  }
  return harness::main_of(argc - 1, argv + 1,
                          {{"library first", [&](auto comm) { run(argv[1], true, comm); }},
                           {"program first", [&](auto comm) { run(argv[1], false, comm); }},
                           {"deferred, library first", [&](auto) { run_deferred(argv[1], true); }},
                           {"deferred, program first",
                            [&](auto) { run_deferred(argv[1], false); }}});
}
