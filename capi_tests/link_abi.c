/* link_abi: the numbers of the C ABI that a compiled program relies on: sizes, offsets, constants. Compiled as C11
 * and as C++17, linked against the shared and the static library. A change here is a change of the ABI: existing
 * values never change; a struct that begins with struct_size may only grow at its end. */
#include <fsdp.h>
#include <stdio.h>
#include <string.h>

#ifdef __cplusplus
#define ABI_ASSERT(condition, text) static_assert(condition, text)
#else
#define ABI_ASSERT(condition, text) _Static_assert(condition, text)
#endif
#define SIZE(type, bytes) ABI_ASSERT(sizeof(type) == (bytes), "size of " #type)
#define FIELD(type, field, offset) \
  ABI_ASSERT(offsetof(type, field) == (offset), "offset of " #type "." #field)
#define VALUE(name, number) ABI_ASSERT((name) == (number), "value of " #name)

#if UINTPTR_MAX != 0xffffffffffffffff
#error "fsdp is for 64-bit machines: the numbers below are theirs"
#endif

SIZE(fsdp_metadata_t, 16);
FIELD(fsdp_metadata_t, key, 0);
FIELD(fsdp_metadata_t, value, 8);
SIZE(fsdp_state_t, 24);
FIELD(fsdp_state_t, param, 0);
FIELD(fsdp_state_t, name, 8);
FIELD(fsdp_state_t, data, 16);

SIZE(fsdp_named_tensor_t, 56);
FIELD(fsdp_named_tensor_t, name, 0);
FIELD(fsdp_named_tensor_t, tensor, 8);
SIZE(fsdp_checkpoint_contents_t, 64);
FIELD(fsdp_checkpoint_contents_t, struct_size, 0);
FIELD(fsdp_checkpoint_contents_t, optimizer, 8);
FIELD(fsdp_checkpoint_contents_t, states, 16);
FIELD(fsdp_checkpoint_contents_t, state_count, 24);
FIELD(fsdp_checkpoint_contents_t, tensors, 32);
FIELD(fsdp_checkpoint_contents_t, tensor_count, 40);
FIELD(fsdp_checkpoint_contents_t, metadata, 48);
FIELD(fsdp_checkpoint_contents_t, metadata_count, 56);
SIZE(fsdp_consolidate_config_t, 24);
FIELD(fsdp_consolidate_config_t, struct_size, 0);
FIELD(fsdp_consolidate_config_t, max_file_bytes, 8);
FIELD(fsdp_consolidate_config_t, dtype, 16);

SIZE(fsdp_shm_config_t, 40);
FIELD(fsdp_shm_config_t, struct_size, 0);
FIELD(fsdp_shm_config_t, job, 8);
FIELD(fsdp_shm_config_t, rank, 16);
FIELD(fsdp_shm_config_t, world_size, 20);
FIELD(fsdp_shm_config_t, rendezvous_timeout_ms, 24);
FIELD(fsdp_shm_config_t, timeout_ms, 32);

SIZE(fsdp_host_comm_config_t, 24);
FIELD(fsdp_host_comm_config_t, struct_size, 0);
FIELD(fsdp_host_comm_config_t, rank, 8);
FIELD(fsdp_host_comm_config_t, world_size, 12);
FIELD(fsdp_host_comm_config_t, timeout_ms, 16);
SIZE(fsdp_host_collectives_t, 128);
FIELD(fsdp_host_collectives_t, struct_size, 0);
FIELD(fsdp_host_collectives_t, all_gather, 8);
FIELD(fsdp_host_collectives_t, reduce_scatter, 16);
FIELD(fsdp_host_collectives_t, all_reduce, 24);
FIELD(fsdp_host_collectives_t, broadcast, 32);
FIELD(fsdp_host_collectives_t, barrier, 40);
FIELD(fsdp_host_collectives_t, test, 48);
FIELD(fsdp_host_collectives_t, wait, 56);
FIELD(fsdp_host_collectives_t, split, 64);
FIELD(fsdp_host_collectives_t, release, 72);
FIELD(fsdp_host_collectives_t, post, 80);
FIELD(fsdp_host_collectives_t, poll, 88);
FIELD(fsdp_host_collectives_t, abort, 96);
FIELD(fsdp_host_collectives_t, alloc, 104);
FIELD(fsdp_host_collectives_t, free, 112);
FIELD(fsdp_host_collectives_t, describe_error, 120);
VALUE(FSDP_HOST_LANE_CONTROL, 0);
VALUE(FSDP_HOST_LANE_GATHER, 1);
VALUE(FSDP_HOST_LANE_REDUCE, 2);
VALUE(FSDP_HOST_LANES, 3);
VALUE(FSDP_HOST_MESSAGE_BYTES, 1024);

SIZE(fsdp_full_gradient_t, 24);
FIELD(fsdp_full_gradient_t, param, 0);
FIELD(fsdp_full_gradient_t, data, 8);
FIELD(fsdp_full_gradient_t, numel, 16);
SIZE(fsdp_unit_gradients_t, 48);
FIELD(fsdp_unit_gradients_t, struct_size, 0);
FIELD(fsdp_unit_gradients_t, unit, 8);
FIELD(fsdp_unit_gradients_t, count, 12);
FIELD(fsdp_unit_gradients_t, name, 16);
FIELD(fsdp_unit_gradients_t, gradients, 24);
FIELD(fsdp_unit_gradients_t, device, 32);
FIELD(fsdp_unit_gradients_t, cuda_stream, 40);

SIZE(fsdp_heap_stats_t, 32);
FIELD(fsdp_heap_stats_t, struct_size, 0);
FIELD(fsdp_heap_stats_t, live_bytes, 8);
FIELD(fsdp_heap_stats_t, peak_bytes, 16);
FIELD(fsdp_heap_stats_t, resident_bytes, 24);

SIZE(fsdp_grad_scaler_config_t, 56);
FIELD(fsdp_grad_scaler_config_t, struct_size, 0);
FIELD(fsdp_grad_scaler_config_t, scale, 8);
FIELD(fsdp_grad_scaler_config_t, growth_factor, 16);
FIELD(fsdp_grad_scaler_config_t, backoff_factor, 24);
FIELD(fsdp_grad_scaler_config_t, growth_interval, 32);
FIELD(fsdp_grad_scaler_config_t, growth_tracker, 40);
FIELD(fsdp_grad_scaler_config_t, enabled, 48);

SIZE(fsdp_device_t, 8);
FIELD(fsdp_device_t, device_type, 0);
FIELD(fsdp_device_t, device_id, 4);

SIZE(fsdp_dtype_t, 4);
FIELD(fsdp_dtype_t, code, 0);
FIELD(fsdp_dtype_t, bits, 1);
FIELD(fsdp_dtype_t, lanes, 2);

SIZE(fsdp_tensor_t, 48);
FIELD(fsdp_tensor_t, data, 0);
FIELD(fsdp_tensor_t, device, 8);
FIELD(fsdp_tensor_t, ndim, 16);
FIELD(fsdp_tensor_t, dtype, 20);
FIELD(fsdp_tensor_t, shape, 24);
FIELD(fsdp_tensor_t, strides, 32);
FIELD(fsdp_tensor_t, byte_offset, 40);

SIZE(fsdp_engine_config_t, 72);
FIELD(fsdp_engine_config_t, struct_size, 0);
FIELD(fsdp_engine_config_t, gradient_slots, 8);
FIELD(fsdp_engine_config_t, strategy, 12);
FIELD(fsdp_engine_config_t, order_check, 16);
FIELD(fsdp_engine_config_t, reduce_dtype, 20);
FIELD(fsdp_engine_config_t, param_init_fn, 24);
FIELD(fsdp_engine_config_t, param_init_user_data, 32);
FIELD(fsdp_engine_config_t, param_dtype, 40);
FIELD(fsdp_engine_config_t, shard_size, 44);
FIELD(fsdp_engine_config_t, sync_module_states, 48);
FIELD(fsdp_engine_config_t, cpu_offload, 52);
FIELD(fsdp_engine_config_t, cuda, 56);
FIELD(fsdp_engine_config_t, grads_in_param_dtype, 64);

SIZE(fsdp_cuda_config_t, 80);
FIELD(fsdp_cuda_config_t, struct_size, 0);
FIELD(fsdp_cuda_config_t, device, 8);
FIELD(fsdp_cuda_config_t, prefetch, 12);
FIELD(fsdp_cuda_config_t, max_units_in_flight, 16);
FIELD(fsdp_cuda_config_t, compute_stream, 24);
FIELD(fsdp_cuda_config_t, timeout_ms, 32);
FIELD(fsdp_cuda_config_t, nccl_unique_id, 40);
FIELD(fsdp_cuda_config_t, alloc, 48);
FIELD(fsdp_cuda_config_t, free, 56);
FIELD(fsdp_cuda_config_t, allocator_user_data, 64);
FIELD(fsdp_cuda_config_t, registered_buffers, 72);

SIZE(fsdp_cuda_stats_t, 72);
FIELD(fsdp_cuda_stats_t, struct_size, 0);
FIELD(fsdp_cuda_stats_t, pool_bytes, 8);
FIELD(fsdp_cuda_stats_t, pool_buffers, 16);
FIELD(fsdp_cuda_stats_t, buffers_peak, 20);
FIELD(fsdp_cuda_stats_t, slot_bytes, 24);
FIELD(fsdp_cuda_stats_t, device_bytes, 32);
FIELD(fsdp_cuda_stats_t, device_bytes_peak, 40);
FIELD(fsdp_cuda_stats_t, evictions, 48);
FIELD(fsdp_cuda_stats_t, overflows, 56);
FIELD(fsdp_cuda_stats_t, registered_bytes, 64);

SIZE(fsdp_sgd_config_t, 48);
FIELD(fsdp_sgd_config_t, struct_size, 0);
FIELD(fsdp_sgd_config_t, lr, 8);
FIELD(fsdp_sgd_config_t, momentum, 16);
FIELD(fsdp_sgd_config_t, dampening, 24);
FIELD(fsdp_sgd_config_t, weight_decay, 32);
FIELD(fsdp_sgd_config_t, nesterov, 40);
FIELD(fsdp_sgd_config_t, maximize, 44);

SIZE(fsdp_adamw_config_t, 56);
FIELD(fsdp_adamw_config_t, struct_size, 0);
FIELD(fsdp_adamw_config_t, lr, 8);
FIELD(fsdp_adamw_config_t, beta1, 16);
FIELD(fsdp_adamw_config_t, beta2, 24);
FIELD(fsdp_adamw_config_t, eps, 32);
FIELD(fsdp_adamw_config_t, weight_decay, 40);
FIELD(fsdp_adamw_config_t, maximize, 48);

SIZE(fsdp_module_init_t, 56);
FIELD(fsdp_module_init_t, struct_size, 0);
FIELD(fsdp_module_init_t, module, 8);
FIELD(fsdp_module_init_t, fqn, 16);
FIELD(fsdp_module_init_t, class_name, 24);
FIELD(fsdp_module_init_t, param_count, 32);
FIELD(fsdp_module_init_t, params, 40);
FIELD(fsdp_module_init_t, tensors, 48);

/* Callbacks. A typedef may be repeated if it is the same type. */
typedef int32_t (*fsdp_wrap_fn)(uint32_t, const char *, const char *, uint64_t, void *);
typedef int32_t (*fsdp_module_init_fn)(const fsdp_module_init_t *, void *);
typedef int32_t (*fsdp_param_init_fn)(uint32_t, const fsdp_tensor_t *, void *);
typedef void (*fsdp_log_fn)(int32_t, const char *, void *);

SIZE(fsdp_unit_info_t, 96);
FIELD(fsdp_unit_info_t, struct_size, 0);
FIELD(fsdp_unit_info_t, name, 8);
FIELD(fsdp_unit_info_t, module, 16);
FIELD(fsdp_unit_info_t, param_count, 20);
FIELD(fsdp_unit_info_t, params, 24);
FIELD(fsdp_unit_info_t, unit_bytes, 32);
FIELD(fsdp_unit_info_t, shard_bytes, 40);
FIELD(fsdp_unit_info_t, padding_bytes, 48);
FIELD(fsdp_unit_info_t, state, 56);
FIELD(fsdp_unit_info_t, reduce_dtype, 60);
FIELD(fsdp_unit_info_t, compute_bytes, 64);
FIELD(fsdp_unit_info_t, all_gathers, 72);
FIELD(fsdp_unit_info_t, reduce_scatters, 80);
FIELD(fsdp_unit_info_t, buffer_bytes, 88);

SIZE(fsdp_param_info_t, 80);
FIELD(fsdp_param_info_t, struct_size, 0);
FIELD(fsdp_param_info_t, name, 8);
FIELD(fsdp_param_info_t, unit, 16);
FIELD(fsdp_param_info_t, ndim, 20);
FIELD(fsdp_param_info_t, shape, 24);
FIELD(fsdp_param_info_t, numel, 32);
FIELD(fsdp_param_info_t, unit_offset, 40);
FIELD(fsdp_param_info_t, shard_offset, 48);
FIELD(fsdp_param_info_t, shard_numel, 56);
FIELD(fsdp_param_info_t, requires_grad, 64);
FIELD(fsdp_param_info_t, dtype, 68);
FIELD(fsdp_param_info_t, compute_offset, 72);

SIZE(fsdp_shard_t, 24);
FIELD(fsdp_shard_t, data, 0);
FIELD(fsdp_shard_t, grad, 8);
FIELD(fsdp_shard_t, numel, 16);

SIZE(fsdp_full_params_config_t, 24);
FIELD(fsdp_full_params_config_t, struct_size, 0);
FIELD(fsdp_full_params_config_t, writeback, 8);
FIELD(fsdp_full_params_config_t, rank0_only, 12);
FIELD(fsdp_full_params_config_t, with_grads, 16);

SIZE(fsdp_stats_t, 152);
FIELD(fsdp_stats_t, struct_size, 0);
FIELD(fsdp_stats_t, param_shard_bytes, 8);
FIELD(fsdp_stats_t, grad_shard_bytes, 16);
FIELD(fsdp_stats_t, gradient_slot_bytes, 24);
FIELD(fsdp_stats_t, padding_bytes, 32);
FIELD(fsdp_stats_t, unit_buffer_bytes, 40);
FIELD(fsdp_stats_t, all_gathers, 48);
FIELD(fsdp_stats_t, all_gather_bytes_moved, 56);
FIELD(fsdp_stats_t, reduce_scatters, 64);
FIELD(fsdp_stats_t, reduce_scatter_bytes, 72);
FIELD(fsdp_stats_t, slots_peak, 80);
FIELD(fsdp_stats_t, overflow_peak, 84);
FIELD(fsdp_stats_t, materialized_peak_bytes, 88);
FIELD(fsdp_stats_t, prefetches, 96);
FIELD(fsdp_stats_t, all_gather_bytes, 104);
FIELD(fsdp_stats_t, all_gather_sent_bytes, 112);
FIELD(fsdp_stats_t, all_reduces, 120);
FIELD(fsdp_stats_t, all_reduce_bytes, 128);
FIELD(fsdp_stats_t, compute_buffer_bytes, 136);
FIELD(fsdp_stats_t, offloaded_bytes, 144);

SIZE(fsdp_plan_request_t, 56);
FIELD(fsdp_plan_request_t, struct_size, 0);
FIELD(fsdp_plan_request_t, world_size, 8);
FIELD(fsdp_plan_request_t, strategy, 12);
FIELD(fsdp_plan_request_t, reduce_dtype, 16);
FIELD(fsdp_plan_request_t, gradient_slots, 20);
FIELD(fsdp_plan_request_t, optimizer_bytes_per_element, 24);
FIELD(fsdp_plan_request_t, rank, 28);
FIELD(fsdp_plan_request_t, param_dtype, 32);
FIELD(fsdp_plan_request_t, shard_size, 36);
FIELD(fsdp_plan_request_t, cpu_offload, 40);
FIELD(fsdp_plan_request_t, device_type, 44);
FIELD(fsdp_plan_request_t, prefetch, 48);
FIELD(fsdp_plan_request_t, grads_in_param_dtype, 52);

SIZE(fsdp_plan_t, 248);
FIELD(fsdp_plan_t, struct_size, 0);
FIELD(fsdp_plan_t, rank, 8);
FIELD(fsdp_plan_t, unit_count, 12);
FIELD(fsdp_plan_t, numel, 16);
FIELD(fsdp_plan_t, trained_numel, 24);
FIELD(fsdp_plan_t, param_shard_bytes, 32);
FIELD(fsdp_plan_t, grad_shard_bytes, 40);
FIELD(fsdp_plan_t, optimizer_bytes, 48);
FIELD(fsdp_plan_t, gradient_slot_bytes, 56);
FIELD(fsdp_plan_t, shard_padding_bytes, 64);
FIELD(fsdp_plan_t, padding_bytes, 72);
FIELD(fsdp_plan_t, unit_buffer_bytes, 80);
FIELD(fsdp_plan_t, unsharded_peak_bytes, 88);
FIELD(fsdp_plan_t, rank_peak_bytes, 96);
FIELD(fsdp_plan_t, host_peak_bytes, 104);
FIELD(fsdp_plan_t, all_gathers, 112);
FIELD(fsdp_plan_t, all_gather_bytes, 120);
FIELD(fsdp_plan_t, all_gather_sent_bytes, 128);
FIELD(fsdp_plan_t, all_gather_messages, 136);
FIELD(fsdp_plan_t, reduce_scatters, 144);
FIELD(fsdp_plan_t, reduce_scatter_bytes, 152);
FIELD(fsdp_plan_t, reduce_scatter_sent_bytes, 160);
FIELD(fsdp_plan_t, reduce_scatter_messages, 168);
FIELD(fsdp_plan_t, all_reduces, 176);
FIELD(fsdp_plan_t, all_reduce_bytes, 184);
FIELD(fsdp_plan_t, all_reduce_sent_bytes, 192);
FIELD(fsdp_plan_t, all_reduce_messages, 200);
FIELD(fsdp_plan_t, compute_buffer_bytes, 208);
FIELD(fsdp_plan_t, all_gather_bytes_moved, 216);
FIELD(fsdp_plan_t, offloaded_bytes, 224);
FIELD(fsdp_plan_t, pool_bytes, 232);
FIELD(fsdp_plan_t, device_peak_bytes, 240);

SIZE(fsdp_plan_unit_t, 88);
FIELD(fsdp_plan_unit_t, struct_size, 0);
FIELD(fsdp_plan_unit_t, module, 8);
FIELD(fsdp_plan_unit_t, param_count, 12);
FIELD(fsdp_plan_unit_t, numel, 16);
FIELD(fsdp_plan_unit_t, unit_bytes, 24);
FIELD(fsdp_plan_unit_t, shard_bytes, 32);
FIELD(fsdp_plan_unit_t, padding_bytes, 40);
FIELD(fsdp_plan_unit_t, all_gathers, 48);
FIELD(fsdp_plan_unit_t, reduce_scatters, 56);
FIELD(fsdp_plan_unit_t, reduce_scatter_bytes, 64);
FIELD(fsdp_plan_unit_t, all_reduces, 72);
FIELD(fsdp_plan_unit_t, all_reduce_bytes, 80);

SIZE(fsdp_status_t, 4);
VALUE(FSDP_REDUCE_SUM, 0);
VALUE(FSDP_REDUCE_AVG, 1);
VALUE(FSDP_REDUCE_MAX, 2);
VALUE(FSDP_REDUCE_MIN, 3);
VALUE(FSDP_FULL_SHARD, 0);
VALUE(FSDP_SHARD_GRAD_OP, 1);
VALUE(FSDP_ORDER_CHECK_ERROR, 0);
VALUE(FSDP_ORDER_CHECK_WARN, 1);
VALUE(FSDP_ORDER_CHECK_OFF, 2);
VALUE(FSDP_REGISTERED_BUFFERS_AUTO, 0);
VALUE(FSDP_REGISTERED_BUFFERS_NEVER, 1);
VALUE(FSDP_REGISTERED_BUFFERS_ALWAYS, 2);
VALUE(FSDP_LARGEST_RANK, -1);
VALUE(FSDP_UNIT_SHARDED, 0);
VALUE(FSDP_UNIT_UNSHARDED, 1);
VALUE(FSDP_OK, 0);
VALUE(FSDP_ERR_INVALID_ARGUMENT, 1);
VALUE(FSDP_ERR_INVALID_HANDLE, 2);
VALUE(FSDP_ERR_INVALID_STATE, 3);
VALUE(FSDP_ERR_UNSUPPORTED, 4);
VALUE(FSDP_ERR_OUT_OF_MEMORY, 5);
VALUE(FSDP_ERR_IO, 6);
VALUE(FSDP_ERR_RENDEZVOUS, 7);
VALUE(FSDP_ERR_PEER_DIED, 8);
VALUE(FSDP_ERR_TIMEOUT, 9);
VALUE(FSDP_ERR_MISMATCH, 10);
VALUE(FSDP_ERR_ABORTED, 11);
VALUE(FSDP_ERR_CHECKPOINT, 12);
VALUE(FSDP_ERR_CALLBACK, 13);
VALUE(FSDP_ERR_PANIC, 14);
VALUE(FSDP_ERR_NONFINITE, 15);
VALUE(FSDP_ERR_DEVICE, 16);
VALUE(FSDP_DEVICE_CPU, 1);
VALUE(FSDP_DEVICE_CUDA, 2);
VALUE(FSDP_DTYPE_INT, 0);
VALUE(FSDP_DTYPE_UINT, 1);
VALUE(FSDP_DTYPE_FLOAT, 2);
VALUE(FSDP_DTYPE_BFLOAT, 4);
VALUE(FSDP_DTYPE_BOOL, 6);
VALUE(FSDP_LOG_DEBUG, 0);
VALUE(FSDP_LOG_INFO, 1);
VALUE(FSDP_LOG_WARNING, 2);
VALUE(FSDP_LOG_OFF, 3);

/* Where a dlpack.h is at hand: a DLTensor may be passed as an fsdp_tensor_t. */
#ifdef FSDP_TEST_DLPACK
#include <ATen/dlpack.h>
#define SAME(ours, our_field, theirs, their_field) \
  ABI_ASSERT(offsetof(ours, our_field) == offsetof(theirs, their_field), "DLPack's " #their_field)
ABI_ASSERT(sizeof(fsdp_tensor_t) == sizeof(DLTensor), "DLTensor");
ABI_ASSERT(sizeof(fsdp_device_t) == sizeof(DLDevice), "DLDevice");
ABI_ASSERT(sizeof(fsdp_dtype_t) == sizeof(DLDataType), "DLDataType");
SAME(fsdp_tensor_t, data, DLTensor, data);
SAME(fsdp_tensor_t, device, DLTensor, device);
SAME(fsdp_tensor_t, ndim, DLTensor, ndim);
SAME(fsdp_tensor_t, dtype, DLTensor, dtype);
SAME(fsdp_tensor_t, shape, DLTensor, shape);
SAME(fsdp_tensor_t, strides, DLTensor, strides);
SAME(fsdp_tensor_t, byte_offset, DLTensor, byte_offset);
SAME(fsdp_device_t, device_id, DLDevice, device_id);
SAME(fsdp_dtype_t, bits, DLDataType, bits);
SAME(fsdp_dtype_t, lanes, DLDataType, lanes);
VALUE(FSDP_DEVICE_CPU, kDLCPU);
VALUE(FSDP_DEVICE_CUDA, kDLCUDA);
VALUE(FSDP_DTYPE_INT, kDLInt);
VALUE(FSDP_DTYPE_UINT, kDLUInt);
VALUE(FSDP_DTYPE_FLOAT, kDLFloat);
VALUE(FSDP_DTYPE_BFLOAT, kDLBfloat);
#endif

int main(void) {
  /* The header that was compiled against and the library that was loaded are of one version. */
  char expected[32];
  snprintf(expected, sizeof expected, "%d.%d.%d", FSDP_VERSION_MAJOR, FSDP_VERSION_MINOR, FSDP_VERSION_PATCH);
  if (strcmp(expected, fsdp_version()) != 0) {
    fprintf(stderr, "the header is of %s, the library of %s\n", expected, fsdp_version());
    return 1;
  }
  return 0;
}
