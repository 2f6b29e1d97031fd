// The second translation unit of test_once.
#include "once.hpp"

namespace once {

const void* table_of_second_unit() { return &fsdp::detail::dispatch_table(); }

void train_in_second_unit(const fsdp::Communicator& comm) {
  auto model = make(comm);
  train(model, comm);
}

}  // namespace once
