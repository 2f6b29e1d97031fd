// The shared library of test_once: built with hidden visibility, so that nothing of the header is
// shared with the program but what goes through LibTorch and libfsdp.
#include "once.hpp"

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED const void* library_table() { return &fsdp::detail::dispatch_table(); }
EXPORTED const void* library_own_deleter() {
  return reinterpret_cast<const void*>(&fsdp::detail::release_storage_tag);
}

EXPORTED void library_train(const fsdp::Communicator* comm) {
  auto model = once::make(*comm);
  once::train(model, *comm);
}

EXPORTED once::Linear* library_make(const fsdp::Communicator* comm) {
  return new once::Linear(once::make(*comm));
}

EXPORTED void library_use(once::Linear* model, const fsdp::Communicator* comm) {
  once::train(*model, *comm);
}

EXPORTED const void* library_log() { return &fsdp::detail::deferred_log(); }

EXPORTED torch::nn::Linear* library_defer() {
  return new torch::nn::Linear(fsdp::deferred_init([] { return torch::nn::Linear(5, 3); }));
}

EXPORTED void library_materialize(torch::nn::Linear* layer) { fsdp::materialize_module(**layer); }
