/* fsdp.h: the C interface of fsdp, fully sharded data parallel training.
 * Generated from src/capi by cbindgen; edit there, then run `make header`.
 *
 * What holds for every function, unless it says otherwise:
 *
 * Errors   A status other than FSDP_OK means that it failed, that nothing was written through its
 *          out-pointers, and that fsdp_last_error_message says why. None throws, unwinds or exits.
 * Ranks    "Collective": every rank calls it, and all ranks call their collectives in the same
 *          order; a difference is FSDP_ERR_MISMATCH on every rank. "Local": no other rank matters.
 *          After a failed collective the communicator is broken: later calls return that error.
 * Threads  Any thread may call anything. Calls on one engine or one communicator run one after the
 *          other; a host that makes collective ones from several threads keeps their order the same.
 * Pointers Arguments are borrowed for the call. Handles are numbers in pointer form, never
 *          dereferenced: a NULL, stale or wrong one is an error; *_destroy(NULL) does nothing.
 * Units    Shapes, offsets and numel count elements; names with bytes or size count bytes. */

#ifndef FSDP_H
#define FSDP_H

#include <stddef.h>
#include <stdint.h>

#define FSDP_VERSION_MAJOR 0
#define FSDP_VERSION_MINOR 1
#define FSDP_VERSION_PATCH 0
/* Initializers of the structs below: struct_size, and every default. */
#define FSDP_SHM_CONFIG_INIT { sizeof(fsdp_shm_config_t), NULL, 0, 1, 0, 0 }
#define FSDP_HOST_COMM_CONFIG_INIT { sizeof(fsdp_host_comm_config_t), 0, 1, 0 }
#define FSDP_HOST_COLLECTIVES_INIT \
  { sizeof(fsdp_host_collectives_t), NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, \
    NULL, NULL, NULL, NULL }
#define FSDP_ENGINE_CONFIG_INIT \
  { sizeof(fsdp_engine_config_t), 0, FSDP_FULL_SHARD, FSDP_ORDER_CHECK_ERROR, { 0, 0, 0 }, NULL, NULL, \
    { 0, 0, 0 }, 0, 0, 0, NULL, 0 }
#define FSDP_CUDA_CONFIG_INIT { sizeof(fsdp_cuda_config_t), 0, 1, 0, NULL, 0, NULL, NULL, NULL, NULL, FSDP_REGISTERED_BUFFERS_AUTO }
#define FSDP_SGD_CONFIG_INIT { sizeof(fsdp_sgd_config_t), 1e-3, 0, 0, 0, 0, 0 }
#define FSDP_ADAMW_CONFIG_INIT { sizeof(fsdp_adamw_config_t), 1e-3, 0.9, 0.999, 1e-8, 1e-2, 0 }
#define FSDP_FULL_PARAMS_CONFIG_INIT { sizeof(fsdp_full_params_config_t), 0, 0, 0 }
#define FSDP_CHECKPOINT_CONTENTS_INIT \
  { sizeof(fsdp_checkpoint_contents_t), NULL, NULL, 0, NULL, 0, NULL, 0 }
#define FSDP_CONSOLIDATE_CONFIG_INIT { sizeof(fsdp_consolidate_config_t), 0, { 0, 0, 0 } }
#define FSDP_GRAD_SCALER_CONFIG_INIT { sizeof(fsdp_grad_scaler_config_t), 65536.0, 2.0, 0.5, 2000, 0, 1 }
#define FSDP_PLAN_REQUEST_INIT \
  { sizeof(fsdp_plan_request_t), 1, FSDP_FULL_SHARD, { 0, 0, 0 }, 0, 0, FSDP_LARGEST_RANK, { 0, 0, 0 }, 0, 0, 0, 1, 0 }

/**
 * Sum over the ranks, in rank order.
 */
#define FSDP_REDUCE_SUM 0

/**
 * Sum divided by the world size; floating dtypes only.
 */
#define FSDP_REDUCE_AVG 1

/**
 * Largest of the ranks' values.
 */
#define FSDP_REDUCE_MAX 2

/**
 * Smallest of the ranks' values.
 */
#define FSDP_REDUCE_MIN 3

/**
 * Lanes of fsdp_host_collectives_t: announcements, and collectives on the caller's memory.
 */
#define FSDP_HOST_LANE_CONTROL 0

/**
 * All-gathers of units.
 */
#define FSDP_HOST_LANE_GATHER 1

/**
 * Reduce-scatters of units.
 */
#define FSDP_HOST_LANE_REDUCE 2

/**
 * Number of lanes.
 */
#define FSDP_HOST_LANES 3

/**
 * Bytes of every message of fsdp_host_collectives_t.post and poll.
 */
#define FSDP_HOST_MESSAGE_BYTES 1024

/**
 * Bytes of fsdp_cuda_config_t.nccl_unique_id.
 */
#define FSDP_NCCL_UNIQUE_ID_BYTES 128

/**
 * fsdp_cuda_config_t.registered_buffers: where NCCL's version can register memory and no allocator is lent.
 */
#define FSDP_REGISTERED_BUFFERS_AUTO 0

/**
 * fsdp_cuda_config_t.registered_buffers: none.
 */
#define FSDP_REGISTERED_BUFFERS_NEVER 1

/**
 * fsdp_cuda_config_t.registered_buffers: with a lent allocator, too; where NCCL's version cannot, the engine is not made.
 */
#define FSDP_REGISTERED_BUFFERS_ALWAYS 2

/**
 * fsdp_engine_config_t.strategy: a unit is unsharded only while it computes, in forward and in backward (ZeRO-3).
 */
#define FSDP_FULL_SHARD 0

/**
 * A unit stays unsharded from its forward until its backward has ended (ZeRO-2).
 */
#define FSDP_SHARD_GRAD_OP 1

/**
 * Every rank holds all parameters, and gradients are averaged over the ranks (data parallel).
 */
#define FSDP_NO_SHARD 2

/**
 * FSDP_FULL_SHARD within groups of shard_size consecutive ranks. The groups are replicas of each other: once an iteration
 * they average their gradients.
 */
#define FSDP_HYBRID_SHARD 3

/**
 * FSDP_SHARD_GRAD_OP within such groups (PyTorch's _HYBRID_SHARD_ZERO2).
 */
#define FSDP_HYBRID_SHARD_GRAD_OP 4

/**
 * fsdp_engine_config_t.order_check: every unshard is compared with the other ranks'; a difference is
 * FSDP_ERR_MISMATCH on every rank.
 */
#define FSDP_ORDER_CHECK_ERROR 0

/**
 * The first training iteration is compared as above. A rank whose forward later differs from its first logs one warning
 * (fsdp_set_log_callback), and goes on: units are matched by their number, and one that a rank skips counts as zero
 * from it.
 */
#define FSDP_ORDER_CHECK_WARN 1

/**
 * The same without the comparison and without the warning.
 */
#define FSDP_ORDER_CHECK_OFF 2

/**
 * fsdp_unit_info_t.state: the unit's parameters cannot be read.
 */
#define FSDP_UNIT_SHARDED 0

/**
 * The unit's parameters can be read as views of the unit buffer.
 */
#define FSDP_UNIT_UNSHARDED 1

/**
 * fsdp_engine_set_reshard_after_forward: as the strategy says. FSDP_FULL_SHARD and FSDP_HYBRID_SHARD reshard every unit but
 * the root, the others none.
 */
#define FSDP_RESHARD_DEFAULT -1

/**
 * The unit stays unsharded until its backward.
 */
#define FSDP_RESHARD_NEVER 0

/**
 * The unit is resharded, and gathered again for its backward.
 */
#define FSDP_RESHARD_ALWAYS 1

/**
 * Level of a message: the steps of an iteration, many.
 */
#define FSDP_LOG_DEBUG 0

/**
 * What happens seldom, e.g. that an engine was made.
 */
#define FSDP_LOG_INFO 1

/**
 * Nothing failed, but what happens may not be what was meant.
 */
#define FSDP_LOG_WARNING 2

/**
 * For fsdp_set_log_level: no messages.
 */
#define FSDP_LOG_OFF 3

/**
 * fsdp_plan_request_t.rank: the rank with the most bytes, the lowest of several.
 */
#define FSDP_LARGEST_RANK -1

/**
 * Success.
 */
#define FSDP_OK 0

/**
 * An argument is NULL, out of range, malformed, or names something that does not exist.
 */
#define FSDP_ERR_INVALID_ARGUMENT 1

/**
 * A handle was destroyed, never existed, or is of another kind.
 */
#define FSDP_ERR_INVALID_HANDLE 2

/**
 * The call is not allowed now, e.g. reading a parameter of a sharded unit.
 */
#define FSDP_ERR_INVALID_STATE 3

/**
 * A thing this version cannot do, e.g. a dtype.
 */
#define FSDP_ERR_UNSUPPORTED 4

/**
 * No memory (host, or shared between ranks).
 */
#define FSDP_ERR_OUT_OF_MEMORY 5

/**
 * The operating system failed a call on a file or a socket.
 */
#define FSDP_ERR_IO 6

/**
 * The ranks could not find each other, or do not fit together.
 */
#define FSDP_ERR_RENDEZVOUS 7

/**
 * Another rank's process ended. The communicator is broken.
 */
#define FSDP_ERR_PEER_DIED 8

/**
 * Another rank did not arrive within the deadline. The communicator is broken.
 */
#define FSDP_ERR_TIMEOUT 9

/**
 * Ranks run different collectives or have different models.
 */
#define FSDP_ERR_MISMATCH 10

/**
 * A rank called fsdp_comm_abort. The communicator is broken.
 */
#define FSDP_ERR_ABORTED 11

/**
 * A checkpoint is incomplete, damaged, or of another model.
 */
#define FSDP_ERR_CHECKPOINT 12

/**
 * A callback of the host reported failure.
 */
#define FSDP_ERR_CALLBACK 13

/**
 * A defect of the library. The engine concerned is unusable.
 */
#define FSDP_ERR_PANIC 14

/**
 * A norm is infinite or NaN, and the call was asked to refuse that.
 */
#define FSDP_ERR_NONFINITE 15

/**
 * A device (a GPU), or a library that drives it, failed a call.
 */
#define FSDP_ERR_DEVICE 16

/**
 * Device type of host memory (DLPack's kDLCPU).
 */
#define FSDP_DEVICE_CPU 1

/**
 * Device type of a GPU's memory (DLPack's kDLCUDA).
 */
#define FSDP_DEVICE_CUDA 2

/**
 * Type codes of fsdp_dtype_t (DLPack's): signed integers.
 */
#define FSDP_DTYPE_INT 0

/**
 * Unsigned integers.
 */
#define FSDP_DTYPE_UINT 1

/**
 * IEEE floating point.
 */
#define FSDP_DTYPE_FLOAT 2

/**
 * The upper bits of an IEEE float32.
 */
#define FSDP_DTYPE_BFLOAT 4

/**
 * Truth values, 8 bits each. Only tensors that go into checkpoints as they are may have it.
 */
#define FSDP_DTYPE_BOOL 6

/**
 * A checkpoint that is being saved in the background.
 */
typedef struct fsdp_checkpoint_job_t fsdp_checkpoint_job_t;

/**
 * A communicator: how this process and the other ranks reach each other.
 */
typedef struct fsdp_comm_t fsdp_comm_t;

/**
 * A sharded model.
 */
typedef struct fsdp_engine_t fsdp_engine_t;

/**
 * Full parameters outside of an iteration.
 */
typedef struct fsdp_full_params_t fsdp_full_params_t;

/**
 * A scaler of float16 gradients.
 */
typedef struct fsdp_grad_scaler_t fsdp_grad_scaler_t;

/**
 * A host's tree of modules and parameters, and which modules are units.
 */
typedef struct fsdp_model_t fsdp_model_t;

/**
 * An optimizer of a sharded model.
 */
typedef struct fsdp_optimizer_t fsdp_optimizer_t;

/**
 * The execution order of a forward.
 */
typedef struct fsdp_trace_t fsdp_trace_t;

/**
 * What every fallible function returns: FSDP_OK or one of the FSDP_ERR_ codes. Numbers are never reused.
 */
typedef int32_t fsdp_status_t;

/**
 * A tensor of optimizer state that is sharded like its parameter.
 */
typedef struct {
  /**
   * The parameter it belongs to.
   */
  uint32_t param;
  /**
   * The optimizer's name for it, e.g. "exp_avg"; not empty, no colon.
   */
  const char *name;
  /**
   * float32, as many as the parameter's piece on this rank (fsdp_shard_t.numel).
   */
  void *data;
} fsdp_state_t;

/**
 * A text to keep with a checkpoint.
 */
typedef struct {
  /**
   * Unique among those of a checkpoint.
   */
  const char *key;
  /**
   * Any UTF-8 text.
   */
  const char *value;
} fsdp_metadata_t;

/**
 * Where a tensor lies; DLPack's DLDevice.
 */
typedef struct {
  /**
   * FSDP_DEVICE_CPU, or FSDP_DEVICE_CUDA where a function takes or gives memory of a GPU.
   */
  int32_t device_type;
  /**
   * 0 for host memory; the GPU's number.
   */
  int32_t device_id;
} fsdp_device_t;

/**
 * An element type; DLPack's DLDataType. float32 is {FSDP_DTYPE_FLOAT, 32, 1}.
 */
typedef struct {
  /**
   * FSDP_DTYPE_INT, FSDP_DTYPE_UINT, FSDP_DTYPE_FLOAT, FSDP_DTYPE_BFLOAT or FSDP_DTYPE_BOOL.
   */
  uint8_t code;
  /**
   * Bits of one element.
   */
  uint8_t bits;
  /**
   * 1.
   */
  uint16_t lanes;
} fsdp_dtype_t;

/**
 * A tensor; laid out as DLPack's DLTensor, so that a DLTensor can be passed. As an argument it borrows data, shape and
 * strides for the call (or as long as the function says); as a result they are borrowed from the engine until
 * fsdp_engine_destroy.
 */
typedef struct {
  /**
   * Start of the memory. NULL if there are no elements; with elements only where a function gives that a meaning.
   */
  void *data;
  fsdp_device_t device;
  /**
   * Number of dimensions; 0 for a scalar.
   */
  int32_t ndim;
  fsdp_dtype_t dtype;
  /**
   * ndim sizes.
   */
  int64_t *shape;
  /**
   * ndim strides in elements, or NULL for a contiguous tensor (row-major). Other tensors are refused.
   */
  int64_t *strides;
  /**
   * Bytes from data to the first element.
   */
  uint64_t byte_offset;
} fsdp_tensor_t;

/**
 * A whole tensor with a name, e.g. a module's buffer: the same on every rank.
 */
typedef struct {
  /**
   * Its original name; not empty, no colon, not that of a parameter.
   */
  const char *name;
  /**
   * Contiguous, in host memory: integers of 8 to 64 bits, floating types of 16 to 64, bfloat16, bool.
   */
  fsdp_tensor_t tensor;
} fsdp_named_tensor_t;

/**
 * What a checkpoint holds beside the engine's shards. Initialize with FSDP_CHECKPOINT_CONTENTS_INIT, then set what there
 * is. All pointers are borrowed for the call.
 */
typedef struct {
  /**
   * sizeof(fsdp_checkpoint_contents_t).
   */
  size_t struct_size;
  /**
   * An optimizer of the same engine, or NULL: its states and counts, as fsdp_optimizer_save and _load treat them.
   */
  fsdp_optimizer_t *optimizer;
  /**
   * State of an optimizer of the host's.
   */
  const fsdp_state_t *states;
  size_t state_count;
  /**
   * Whole tensors: rank 0's are saved, every rank's are filled.
   */
  const fsdp_named_tensor_t *tensors;
  size_t tensor_count;
  /**
   * Texts to keep (rank 0's are kept). Ignored in loading.
   */
  const fsdp_metadata_t *metadata;
  size_t metadata_count;
} fsdp_checkpoint_contents_t;

/**
 * How a rank joins a job on one host. Initialize with FSDP_SHM_CONFIG_INIT, then set what differs.
 */
typedef struct {
  /**
   * sizeof(fsdp_shm_config_t).
   */
  size_t struct_size;
  /**
   * The job's name, the same on every rank and used by no other running job of this user. Borrowed for the call.
   */
  const char *job;
  /**
   * This process's rank, 0 to world_size - 1.
   */
  int32_t rank;
  /**
   * Number of processes of the job.
   */
  int32_t world_size;
  /**
   * Milliseconds to wait for the other ranks to join; 0: 120,000.
   */
  int64_t rendezvous_timeout_ms;
  /**
   * Milliseconds to wait for a living rank in a collective; 0: 600,000. A dead rank is noticed at once.
   */
  int64_t timeout_ms;
} fsdp_shm_config_t;

/**
 * Which rank this is. Initialize with FSDP_HOST_COMM_CONFIG_INIT, then set what differs.
 */
typedef struct {
  /**
   * sizeof(fsdp_host_comm_config_t).
   */
  size_t struct_size;
  /**
   * This rank, 0 to world_size - 1.
   */
  int32_t rank;
  /**
   * Number of ranks, 1 to 1,048,576.
   */
  int32_t world_size;
  /**
   * Milliseconds that a collective waits while nothing moves; 0: 600,000. Callbacks that block are not interrupted.
   */
  int64_t timeout_ms;
} fsdp_host_comm_config_t;

/**
 * What a host lends: collectives on plain memory of this process. Initialize with FSDP_HOST_COLLECTIVES_INIT.
 *
 * Every callback gets the user_data first. It returns 0, or anything else when it has failed: the communicator is broken
 * then, and the error, FSDP_ERR_CALLBACK, names collective, unit and number. None may throw, unwind or longjmp.
 *
 * Lanes     Collectives of one lane are started in the same order, with the same sizes, on every rank. Lanes are
 *           independent of each other: on MPI each is a communicator of its own.
 * Requests  A collective either ends before the callback returns (*request stays NULL), or sets *request, not NULL, and
 *           returns without waiting for other ranks; it has ended when `test` says so. The memory stays as it is until
 *           then, and for ever if that never comes. Without `test` all must block; with it none may wait for other
 *           ranks. Several may be under way at once, on each lane.
 * Threads   One thread at a time calls collectives, test, wait and split of one user_data; those of a split one may be
 *           called by another thread at the same time. post, poll, abort, alloc, free and describe_error: by any thread,
 *           at any time. release: by whichever thread destroys the last user.
 * Memory    Never overlaps but where that is said; may have any alignment that fits its elements.
 *
 * Types are float32, float64, float16, bfloat16, int32, int64 and uint8, as fsdp_dtype_t; op is FSDP_REDUCE_SUM, _MAX or
 * _MIN. Order and rounding of sums are the host's: those of reduce_scatter are what gradients are made of. What all_reduce
 * gives must be the same bits on every rank.
 */
typedef struct {
  /**
   * sizeof(fsdp_host_collectives_t).
   */
  size_t struct_size;
  /**
   * output = the ranks' inputs, `bytes` each, in rank order. input may be its place in output. Required, as are the next
   * four.
   */
  int32_t (*all_gather)(void *user_data,
                        int32_t lane,
                        const void *input,
                        void *output,
                        size_t bytes,
                        void **request);
  /**
   * output = elements rank * count to (rank + 1) * count - 1 of the ranks' inputs (world_size * count each) combined.
   */
  int32_t (*reduce_scatter)(void *user_data,
                            int32_t lane,
                            const void *input,
                            void *output,
                            size_t count,
                            fsdp_dtype_t dtype,
                            int32_t op,
                            void **request);
  /**
   * data, `count` elements, combined over the ranks, in place.
   */
  int32_t (*all_reduce)(void *user_data,
                        int32_t lane,
                        void *data,
                        size_t count,
                        fsdp_dtype_t dtype,
                        int32_t op,
                        void **request);
  /**
   * Rank root's data on every rank.
   */
  int32_t (*broadcast)(void *user_data,
                       int32_t lane,
                       void *data,
                       size_t bytes,
                       int32_t root,
                       void **request);
  /**
   * Ends when every rank has started it.
   */
  int32_t (*barrier)(void *user_data, int32_t lane, void **request);
  /**
   * Whether a request has ended: *done = 1, and the request is gone, or 0. Does not wait. NULL: all collectives block.
   */
  int32_t (*test)(void *user_data, void *request, int32_t *done);
  /**
   * The same, after sleeping until it has ended, at most timeout_ms. NULL: `test` is called again and again.
   */
  int32_t (*wait)(void *user_data, void *request, int64_t timeout_ms, int32_t *done);
  /**
   * Collective: *part = the user_data of a communicator of those ranks that give the same color: members, count numbers of
   * this communicator's ranks in the order of their new ranks ((key, rank), as of MPI_Comm_split). May wait. NULL: hybrid
   * strategies, reshard_after_forward over fewer ranks and saves in the background are FSDP_ERR_UNSUPPORTED.
   */
  int32_t (*split)(void *user_data,
                   int32_t color,
                   int32_t key,
                   const int32_t *members,
                   int32_t count,
                   void **part);
  /**
   * The last use of a user_data, of fsdp_comm_init_host or of split: nothing is called with it any more. Local. NULL:
   * nothing. Not called where a collective has never ended.
   */
  void (*release)(void *user_data);
  /**
   * Sends FSDP_HOST_MESSAGE_BYTES to a rank without waiting for it; the message is copied. By these ranks learn at once of
   * an error or an abort of another, and a missed deadline names who is missing. NULL, as poll then: they learn by
   * their deadline.
   */
  int32_t (*post)(void *user_data, int32_t rank, const void *message);
  /**
   * A message that has come: *rank = its sender, message is filled. *rank = -1: none. Does not wait.
   */
  int32_t (*poll)(void *user_data, int32_t *rank, void *message);
  /**
   * The communicator has failed: the host may end what it can, e.g. blocking callbacks of other threads. Local. NULL:
   * nothing.
   */
  void (*abort)(void *user_data, const char *reason);
  /**
   * Memory for sums and staging that collectives run best on (registered, pinned), 64-byte aligned; NULL if there is none
   * left. Unit buffers and gradient slots are never of it: their pages come and go. Both NULL: the library's own.
   */
  void *(*alloc)(void *user_data, size_t bytes);
  void (*free)(void *user_data, void *memory, size_t bytes);
  /**
   * Writes what a callback's number means, NUL-terminated, to text. NULL: messages have the number.
   */
  void (*describe_error)(void *user_data, int32_t code, char *text, size_t size);
} fsdp_host_collectives_t;

/**
 * How to consolidate. Initialize with FSDP_CONSOLIDATE_CONFIG_INIT, then set what differs.
 */
typedef struct {
  /**
   * sizeof(fsdp_consolidate_config_t).
   */
  size_t struct_size;
  /**
   * Bytes of tensors per file, unless a single tensor has more; 0: 5,000,000,000.
   */
  uint64_t max_file_bytes;
  /**
   * What parameters are rounded to, to nearest even: float32, {FSDP_DTYPE_FLOAT, 16, 1}, {FSDP_DTYPE_BFLOAT, 16, 1},
   * or {0, 0, 0} for as they are.
   */
  fsdp_dtype_t dtype;
} fsdp_consolidate_config_t;

/**
 * What an engine on a GPU has taken there and done. Set struct_size before the call.
 */
typedef struct {
  /**
   * sizeof(fsdp_cuda_stats_t).
   */
  size_t struct_size;
  /**
   * Bytes of the fixed pool of unit buffers.
   */
  uint64_t pool_bytes;
  /**
   * Unit buffers in the pool.
   */
  uint32_t pool_buffers;
  /**
   * Most unit buffers that held a unit at once, gathered ahead included.
   */
  uint32_t buffers_peak;
  /**
   * Bytes of the fixed gradient slots.
   */
  uint64_t slot_bytes;
  /**
   * Bytes of device memory that the engine and its optimizers have now: the pool, slots, shards, gradient shards, states,
   * and what was taken beyond the pool.
   */
  uint64_t device_bytes;
  /**
   * Most of it at once.
   */
  uint64_t device_bytes_peak;
  /**
   * All-gathers that were issued ahead and had to make room before they were used.
   */
  uint64_t evictions;
  /**
   * Times that unit buffers, and gradient slots, were taken beyond the pool.
   */
  uint64_t overflows;
  /**
   * Bytes of the pool that are registered with NCCL, what aligns them included: all of them, or 0.
   */
  uint64_t registered_bytes;
} fsdp_cuda_stats_t;

/**
 * A module to initialize. The library sets struct_size; pointers are borrowed for the call. A newer library appends
 * fields.
 */
typedef struct {
  /**
   * Bytes of the struct.
   */
  size_t struct_size;
  /**
   * The module's number.
   */
  uint32_t module;
  /**
   * Its fully qualified name, "" for the root.
   */
  const char *fqn;
  /**
   * As given to fsdp_model_add_module.
   */
  const char *class_name;
  /**
   * Parameters to fill; 0 for a module without any.
   */
  uint32_t param_count;
  /**
   * Their numbers, in order of registration.
   */
  const uint32_t *params;
  /**
   * Their memory: contiguous, of the dtype they were registered with, on a 64-byte line. Its contents are undefined; every element must be written.
   */
  const fsdp_tensor_t *tensors;
} fsdp_module_init_t;

/**
 * Initializes the parameters of a module; 0 when done, any other number stops with FSDP_ERR_CALLBACK. Called in the
 * thread of fsdp_engine_create; must not throw or unwind.
 */
typedef int32_t (*fsdp_module_init_fn)(const fsdp_module_init_t *init, void *user_data);

/**
 * An engine on a GPU: what fsdp_engine_config_t.cuda points to. Initialize with FSDP_CUDA_CONFIG_INIT, then set what
 * differs.
 *
 * CUDA's driver and NVRTC, and with several ranks NCCL, are looked for when the engine is made: what this machine lacks is
 * FSDP_ERR_UNSUPPORTED, with a message that says what was looked for and where. Each rank has a GPU; the communicator that
 * the engine is made with stays on the host: it compares what ranks do and carries small things, NCCL moves the rest.
 *
 * Addresses of an engine on a GPU are device addresses: of fsdp_engine_unshard, fsdp_engine_param_data and
 * fsdp_engine_param_grad always; those of fsdp_shard_t and of an optimizer's states, too, unless cpu_offload is set: they are
 * pinned host memory then. Tensors say which (fsdp_tensor_t.device). What the host launches that uses them, it launches on
 * the compute stream; the engine orders its own queues after and before that, and waits on the host only where a function
 * says so. Pieces and states that the host gives (fsdp_engine_total_norm, fsdp_grad_scaler_*, fsdp_state_t,
 * fsdp_engine_gather) lie where the engine's shards do; full parameters, whole tensors of checkpoints and initializers'
 * tensors are in host memory.
 *
 * With several ranks units are unsharded and reduced in the same
 * order on every rank (reduced: of every shard group), whatever order_check says, and 16-bit gradients are summed by NCCL in that
 * type. A unit that is resharded over a number of ranks (fsdp_engine_set_reshard_after_forward) keeps a part of its unit buffer in
 * memory that is taken and given back as it is used. Engines that share shards (fsdp_model_add_sharded) are on one GPU, with the
 * same cpu_offload (else FSDP_ERR_UNSUPPORTED), and are used on one compute stream, or the host orders their streams; the first
 * one's stream and allocator are used until the last of them is destroyed.
 * With replicas (hybrid strategies, FSDP_NO_SHARD) each reduce-scatter of a backward that averages over them is followed by an
 * all-reduce of the shard, in float32; fsdp_engine_set_is_last_backward and fsdp_engine_set_requires_all_reduce are called before
 * the backward that they are for, the same on every rank.
 */
typedef struct {
  /**
   * sizeof(fsdp_cuda_config_t).
   */
  size_t struct_size;
  /**
   * The GPU's number among those that this process sees; may differ between ranks.
   */
  int32_t device;
  /**
   * Units gathered ahead of their use at most, where fsdp_engine_set_prefetch_order gives an order; 0: none. Each may take
   * a unit buffer.
   */
  uint32_t prefetch;
  /**
   * Most unit buffers at once; a unit that needs one more is FSDP_ERR_INVALID_STATE. 0: as many as needed: a
   * fixed pool for the deepest path of nested units and `prefetch` more (without resharding after forward: for all units),
   * and memory taken and given back as it is used for what the pool has no room for.
   */
  uint32_t max_units_in_flight;
  /**
   * The host's stream (a cudaStream_t or CUstream of the GPU's primary context) until fsdp_engine_set_compute_stream says
   * otherwise; NULL: the legacy default stream. It outlives the engine and its optimizers. cudaStreamPerThread is
   * FSDP_ERR_INVALID_ARGUMENT: it is another stream on every thread.
   */
  void *compute_stream;
  /**
   * Milliseconds that a collective may take on the GPU once it is its turn; 0: 600,000.
   */
  int64_t timeout_ms;
  /**
   * FSDP_NCCL_UNIQUE_ID_BYTES bytes, the same on every rank, of which no other communicator was made (ncclGetUniqueId); NULL
   * on every rank: rank 0 makes one. Not used with one rank, which needs no NCCL.
   */
  const void *nccl_unique_id;
  /**
   * Takes device memory that work on `stream` may use from here on, at an address of a multiple of 256; NULL if there is
   * none. `bytes` is more than 0. NULL: memory comes from the driver's pool. May be called in every function of the
   * engine, in its thread, with the GPU's primary context current; must not call the engine.
   */
  void *(*alloc)(void *user_data, size_t bytes, void *stream);
  /**
   * Gives it back: work that comes later on `stream`, the one it was taken for, may use it for something else. NULL exactly
   * if alloc is.
   */
  void (*free)(void *user_data, void *memory, size_t bytes, void *stream);
  /**
   * Passed to alloc and free; used until the engine and its optimizers are destroyed.
   */
  void *allocator_user_data;
  /**
   * Whether the fixed unit buffers of shard groups of several ranks are memory of NCCL's own (ncclMemAlloc) that is registered
   * with the communicators that gather into it (the group's, and those of smaller groups), so that NCCL copies nothing in
   * between: FSDP_REGISTERED_BUFFERS_AUTO, _NEVER or _ALWAYS, the same on every rank. As windows where the version has them
   * (2.27), else as buffers (2.19); before that AUTO registers nothing, and ALWAYS is FSDP_ERR_UNSUPPORTED. A registration that
   * NCCL refuses is an error of every rank: no engine is made, or it is broken (smaller groups). NCCL wants every rank to use the same
   * buffer for the same all-gather: ranks must reshard in the same order as well, relative to what they unshard; a rank that
   * does not is FSDP_ERR_MISMATCH on all, which NEVER avoids. Gradient slots are not registered, neither for reduce-scatters nor
   * for the replicas' all-reduces, since which slot a unit has depends on which gradients a rank has; nor is what is taken
   * beyond the pool. NCCL rounds the memory up to pieces of 2 MiB or more, which is not counted; fsdp_engine_destroy waits for
   * the GPU before it is freed.
   */
  int32_t registered_buffers;
} fsdp_cuda_config_t;

/**
 * Options of an engine, the same on every rank. Initialize with FSDP_ENGINE_CONFIG_INIT, then set what differs.
 */
typedef struct {
  /**
   * sizeof(fsdp_engine_config_t).
   */
  size_t struct_size;
  /**
   * Buffers per rank for a unit's full gradients: how many units may collect or reduce gradients at once. 0: one
   * more than the levels of nested units and, but on a GPU, as many small ones more (256 at most) as fit in 1 MiB. A unit
   * that finds all taken collects in memory of its own.
   */
  uint32_t gradient_slots;
  /**
   * FSDP_FULL_SHARD, FSDP_SHARD_GRAD_OP, FSDP_NO_SHARD, FSDP_HYBRID_SHARD or FSDP_HYBRID_SHARD_GRAD_OP. Whatever it is,
   * the root stays unsharded between its forward and its backward: see fsdp_engine_set_reshard_after_forward.
   */
  int32_t strategy;
  /**
   * FSDP_ORDER_CHECK_ERROR, _WARN or _OFF. Reductions are matched by unit in every case; everything else is always
   * compared.
   */
  int32_t order_check;
  /**
   * The type that each rank rounds its gradients to (to nearest even) before they are summed; the sum and the gradient
   * shards are float32. {FSDP_DTYPE_FLOAT, 16, 1}, {FSDP_DTYPE_BFLOAT, 16, 1}, or {0, 0, 0} for float32.
   */
  fsdp_dtype_t reduce_dtype;
  /**
   * Initializes the parameters without storage, module by module, in place of the reset functions (also of modules
   * without parameters) and parameter initializers of the model; NULL to use those. Called by fsdp_engine_create only,
   * in its thread.
   */
  fsdp_module_init_fn param_init_fn;
  /**
   * Passed to param_init_fn.
   */
  void *param_init_user_data;
  /**
   * What parameters are computed in (unsharded to), unless the model says otherwise (fsdp_model_set_unit_dtypes,
   * fsdp_model_set_param_dtype): float32, float16, bfloat16, or {0, 0, 0} for the dtype each was registered with. Shards
   * are float32 whatever it is. A part of the model that was sharded before keeps what it had.
   */
  fsdp_dtype_t param_dtype;
  /**
   * Ranks of a shard group, a divisor of the world size, with the hybrid strategies; else 0.
   */
  uint32_t shard_size;
  /**
   * 1: every rank starts from rank 0's values, which it broadcasts. The others' memory and initializers are not looked at,
   * and a parameter may have storage on some ranks only. 0: each rank cuts its own.
   */
  int32_t sync_module_states;
  /**
   * 1: this rank's shards, gradient shards and optimizer state (of fsdp_optimizer_t) lie in host memory, apart from the
   * unit buffers, which are on the device; shards are uploaded when they are first needed after they were written. On the
   * CPU this is a second copy of the shards in the same kind of memory, and gives the same results. 0: they lie on the
   * device, and shards in the unit buffers. A part of the model that was sharded before stays where it was. On a GPU host
   * memory is pinned, shards go up as units are gathered, and gradients come down as they are reduced.
   */
  int32_t cpu_offload;
  /**
   * The engine computes on a GPU: see fsdp_cuda_config_t; borrowed for the call. On every rank or on none. NULL: on the CPU.
   */
  const fsdp_cuda_config_t *cuda;
  /**
   * 1: gradients come in the dtype that their parameters are computed in. A unit whose parameters are all computed in the
   * same 16-bit dtype then collects its gradients in it: the regions of fsdp_engine_param_grad have that dtype, and take
   * and move half of the memory. That is so for the first gradient of a parameter in a backward: what is added to is
   * float32, as is everything while backwards leave their gradients for later ones
   * (fsdp_engine_set_requires_gradient_sync) or a communication hook is set, so that nothing is rounded that would not be
   * with 0. Ranks sum as ever: each gradient rounded to reduce_dtype, in float32. On lent collectives only in units whose
   * reduce_dtype is the same. 0: all regions are float32. FSDP_ERR_UNSUPPORTED on a GPU.
   */
  int32_t grads_in_param_dtype;
} fsdp_engine_config_t;

/**
 * A unit. Set struct_size before the call; pointers are borrowed until fsdp_engine_destroy.
 */
typedef struct {
  /**
   * sizeof(fsdp_unit_info_t).
   */
  size_t struct_size;
  /**
   * Fully qualified name of its module, "" for the root.
   */
  const char *name;
  /**
   * Number of its module.
   */
  uint32_t module;
  /**
   * Parameters that it owns.
   */
  uint32_t param_count;
  /**
   * Their numbers, in order of registration.
   */
  const uint32_t *params;
  /**
   * Bytes of the unit buffer: world_size times shard_bytes.
   */
  uint64_t unit_bytes;
  /**
   * Bytes of this rank's shard.
   */
  uint64_t shard_bytes;
  /**
   * Bytes of the unit buffer that belong to no parameter.
   */
  uint64_t padding_bytes;
  /**
   * FSDP_UNIT_SHARDED or FSDP_UNIT_UNSHARDED.
   */
  int32_t state;
  /**
   * The type that its gradients are rounded to before they are summed.
   */
  fsdp_dtype_t reduce_dtype;
  /**
   * Bytes of the copies of its parameters that are computed in 16 bits, each on a 64-byte line; on shm one copy a host.
   */
  uint64_t compute_bytes;
  /**
   * All-gathers of the unit so far.
   */
  uint64_t all_gathers;
  /**
   * Reduce-scatters of it that this rank has started.
   */
  uint64_t reduce_scatters;
  /**
   * Bytes at the address that fsdp_engine_unshard gives. On the CPU unit_bytes; on a GPU the unit's layout in each type that
   * one of its parameters is computed in, one behind the other: float32, bfloat16, float16.
   */
  uint64_t buffer_bytes;
} fsdp_unit_info_t;

/**
 * A parameter and its place. Set struct_size before the call; pointers are borrowed until fsdp_engine_destroy.
 */
typedef struct {
  /**
   * sizeof(fsdp_param_info_t).
   */
  size_t struct_size;
  /**
   * Fully qualified name of its first registration.
   */
  const char *name;
  /**
   * The unit that owns it.
   */
  uint32_t unit;
  /**
   * Number of dimensions.
   */
  int32_t ndim;
  /**
   * ndim sizes.
   */
  const int64_t *shape;
  /**
   * Elements.
   */
  int64_t numel;
  /**
   * First element in the unit buffer, in elements from its start.
   */
  int64_t unit_offset;
  /**
   * First element of this rank's piece in the flattened (row-major) parameter; 0 if the piece is empty.
   */
  int64_t shard_offset;
  /**
   * Elements of this rank's piece; may be 0.
   */
  int64_t shard_numel;
  /**
   * 0 if it is frozen.
   */
  int32_t requires_grad;
  /**
   * What it is computed in: the dtype of fsdp_engine_param_data.
   */
  fsdp_dtype_t dtype;
  /**
   * First byte of its 16-bit copy among those of its unit; 0 if it is computed in float32. On a GPU, of every parameter: its
   * first byte in the unit buffer.
   */
  int64_t compute_offset;
} fsdp_param_info_t;

/**
 * What an engine uses and has done. Set struct_size before the call.
 */
typedef struct {
  /**
   * sizeof(fsdp_stats_t).
   */
  size_t struct_size;
  /**
   * Bytes of this rank's shards of all units, padding included.
   */
  uint64_t param_shard_bytes;
  /**
   * Bytes of this rank's gradient shards, padding and alignment included.
   */
  uint64_t grad_shard_bytes;
  /**
   * Bytes of this rank's gradient slots, when all are used to the full. A unit that finds all taken uses as much
   * again as the largest of them.
   */
  uint64_t gradient_slot_bytes;
  /**
   * Bytes of all unit buffers that belong to no parameter.
   */
  uint64_t padding_bytes;
  /**
   * Bytes of all unit buffers, each on a cache line of its own. On shm they are the ranks' shards laid end to end: one
   * copy a host. On a GPU: of the fixed pool.
   */
  uint64_t unit_buffer_bytes;
  /**
   * All-gathers so far.
   */
  uint64_t all_gathers;
  /**
   * Bytes that they moved. On shm: what this rank's shards took in 16 bits, when they were rounded for those parameters
   * that are computed so; once after each time that shards could be written, and nothing else.
   */
  uint64_t all_gather_bytes_moved;
  /**
   * Reduce-scatters so far.
   */
  uint64_t reduce_scatters;
  /**
   * Bytes of the gradients that this rank gave to them.
   */
  uint64_t reduce_scatter_bytes;
  /**
   * Most gradient slots in use at once.
   */
  uint32_t slots_peak;
  /**
   * Most units at once that collected gradients in memory of their own.
   */
  uint32_t overflow_peak;
  /**
   * Most bytes of full parameters in private memory at once while fsdp_engine_create gave parameters without storage
   * their values: the largest unit of such parameters, alignment included.
   */
  uint64_t materialized_peak_bytes;
  /**
   * All-gathers issued ahead of the unit that was asked for (fsdp_engine_set_prefetch_order).
   */
  uint64_t prefetches;
  /**
   * Bytes of the unit buffers that all-gathers have filled.
   */
  uint64_t all_gather_bytes;
  /**
   * Bytes of them that each rank sends where bytes move: (n - 1) / n of them in a group of n ranks.
   */
  uint64_t all_gather_sent_bytes;
  /**
   * All-reduces of gradients over replicas so far: one per unit with gradients and iteration.
   */
  uint64_t all_reduces;
  /**
   * Bytes of this rank's gradients that it gave to them.
   */
  uint64_t all_reduce_bytes;
  /**
   * Bytes of the copies of all parameters that are computed in 16 bits; on shm one copy a host. 0 on a GPU, whose unit
   * buffers have them.
   */
  uint64_t compute_buffer_bytes;
  /**
   * Bytes of this rank's shards in host memory, besides their place in the unit buffers (cpu_offload).
   */
  uint64_t offloaded_bytes;
} fsdp_stats_t;

/**
 * What a scope of full parameters holds, the same on every rank. Initialize with FSDP_FULL_PARAMS_CONFIG_INIT, then set
 * what differs.
 */
typedef struct {
  /**
   * sizeof(fsdp_full_params_config_t).
   */
  size_t struct_size;
  /**
   * 1: what the scope holds when it is closed goes to the shards, of parameters and (with_grads) gradients. 0: it is
   * dropped.
   */
  int32_t writeback;
  /**
   * 1: only rank 0 holds the full parameters; it is its values that are written back. 0: every rank holds them, and
   * writes its own piece back.
   */
  int32_t rank0_only;
  /**
   * 1: full gradients too.
   */
  int32_t with_grads;
} fsdp_full_params_config_t;

/**
 * Receives a full tensor: a parameter (`state` NULL) or the state of an optimizer that belongs to it. `name` is the
 * parameter's fully qualified name, `tensor` contiguous float32 of its shape, to be read only; all are borrowed for the
 * call. Returns 0, or another number to make it an error. Called in the calling thread; must not call functions of this
 * engine, throw or unwind.
 */
typedef int32_t (*fsdp_full_state_fn)(uint32_t param,
                                      const char *name,
                                      const char *state,
                                      const fsdp_tensor_t *tensor,
                                      void *user_data);

/**
 * This process's heap of large blocks. Set struct_size before the call.
 */
typedef struct {
  /**
   * sizeof(fsdp_heap_stats_t).
   */
  size_t struct_size;
  /**
   * Bytes of the blocks that live, in whole pages.
   */
  uint64_t live_bytes;
  /**
   * The most of them at once since the last fsdp_heap_trim.
   */
  uint64_t peak_bytes;
  /**
   * Bytes of the huge pages that have memory: what lives, what is kept for the next blocks, and what lies between.
   */
  uint64_t resident_bytes;
} fsdp_heap_stats_t;

/**
 * One parameter's full gradient, in the parameter's shape.
 */
typedef struct {
  /**
   * The parameter's number.
   */
  uint32_t param;
  /**
   * numel floats, to be read and changed; on a GPU an address there.
   */
  float *data;
  /**
   * Elements; may be 0.
   */
  int64_t numel;
} fsdp_full_gradient_t;

/**
 * The gradients that a rank has collected for a unit. Borrowed for the call.
 */
typedef struct {
  /**
   * sizeof(fsdp_unit_gradients_t) of the library; later versions may be longer.
   */
  size_t struct_size;
  /**
   * The unit's number.
   */
  uint32_t unit;
  /**
   * Parameters that have a gradient on this rank: at least 1.
   */
  uint32_t count;
  /**
   * Fully qualified name of the unit's module, "" for the root.
   */
  const char *name;
  /**
   * `count` of them, in the order of the unit's parameters.
   */
  const fsdp_full_gradient_t *gradients;
  /**
   * Where they lie.
   */
  fsdp_device_t device;
  /**
   * On a GPU: the stream (a CUstream or cudaStream_t) that the hook puts its work on. NULL on the CPU.
   */
  void *cuda_stream;
} fsdp_unit_gradients_t;

/**
 * Compresses or changes a unit's gradients in place. Returns 0, or anything else when it has failed. Called in the thread
 * that starts the unit's reduction, from within fsdp_engine_reduce, post_backward or finish_backward, with the engine
 * locked: a call on that engine from inside is FSDP_ERR_INVALID_STATE. Other libraries and other engines may be called;
 * it must not throw or unwind.
 *
 * On a GPU nobody waits: the gradients may not be there yet when the hook is called. On cuda_stream they are complete, and what
 * the hook launches on that stream runs before the reduction does, which is launched there when it returns. Work on other
 * streams the hook orders by events, after and before that one; memory that it takes for the work it gives back in the
 * stream's order. The GPU's primary context is current. An engine's stream is the same in every call, and is there until the
 * process ends.
 */
typedef int32_t (*fsdp_comm_hook_fn)(const fsdp_unit_gradients_t *gradients, void *user_data);

/**
 * Receives a message (one line without its end, borrowed for the call) and its level, FSDP_LOG_*. Called in any thread
 * that calls fsdp, from within that call, by several at once; may call fsdp; must not throw or unwind.
 */
typedef void (*fsdp_log_fn)(int32_t level, const char *message, void *user_data);

/**
 * Initializes one parameter: writes every element of `tensor` (as in fsdp_module_init_t, borrowed for the call).
 * Otherwise as fsdp_module_init_fn.
 */
typedef int32_t (*fsdp_param_init_fn)(uint32_t param, const fsdp_tensor_t *tensor, void *user_data);

/**
 * Decides whether a module becomes a unit: positive yes, 0 no, negative stops with FSDP_ERR_CALLBACK. `fqn` and
 * `class_name` are borrowed for the call; `numel` counts the elements in and below the module. Called in the calling
 * thread, parents before their children; must not throw or unwind.
 */
typedef int32_t (*fsdp_wrap_fn)(uint32_t module,
                                const char *fqn,
                                const char *class_name,
                                uint64_t numel,
                                void *user_data);

/**
 * Options of stochastic gradient descent, with the meaning that they have in torch.optim.SGD. Initialize with
 * FSDP_SGD_CONFIG_INIT, then set what differs.
 *
 * Lower-case names are float32; [x] is x computed in double and rounded to float32 once. Each line is one operation after
 * the other, left to right, each rounded to nearest, without fused multiply-add, so that the result is the same bit for
 * bit (NaNs aside) whatever the world size, the wrapping and the processor's vectors, in the processor's default
 * floating-point mode. lr is the optimizer's times the parameter's factor.
 *
 *   g = grad                                        (maximize: -grad)
 *   g = g + [weight_decay] * p                      (only if weight_decay is not 0)
 *   b = [momentum] * b + [1 - dampening] * g        (only with momentum; b = g in the parameter's first step)
 *   d = b                                           (nesterov: g + [momentum] * b; without momentum: g)
 *   p = p - [lr] * d
 */
typedef struct {
  /**
   * sizeof(fsdp_sgd_config_t).
   */
  size_t struct_size;
  /**
   * Learning rate, at least 0.
   */
  double lr;
  /**
   * At least 0. With 0 there is no state; else the state "momentum_buffer".
   */
  double momentum;
  /**
   * Any finite number.
   */
  double dampening;
  /**
   * At least 0.
   */
  double weight_decay;
  /**
   * Not 0: Nesterov's momentum, which needs a momentum and no dampening.
   */
  int32_t nesterov;
  /**
   * Not 0: climb instead of descending.
   */
  int32_t maximize;
} fsdp_sgd_config_t;

/**
 * Options of AdamW (Adam with decoupled weight decay: Loshchilov & Hutter, arXiv 1711.05101), with the meaning that they
 * have in torch.optim.AdamW. Initialize with FSDP_ADAMW_CONFIG_INIT, then set what differs; weight_decay 0 is plain Adam.
 * The states are "exp_avg" (m) and "exp_avg_sq" (v), both 0 at first.
 *
 * Notation and promise as for fsdp_sgd_config_t. t is the parameter's number of steps, this one included; powers are
 * computed in double by squaring (result *= base for each set bit of t, lowest first, base *= base after each bit).
 *
 *   g = grad                                        (maximize: -grad)
 *   w = p * [1 - lr * weight_decay]
 *   m = [beta1] * m + [1 - beta1] * g
 *   v = [beta2] * v + [1 - beta2] * g * g
 *   d = sqrt(v) / [sqrt(1 - beta2^t)] + [eps]
 *   p = w - [lr / (1 - beta1^t)] * m / d
 */
typedef struct {
  /**
   * sizeof(fsdp_adamw_config_t).
   */
  size_t struct_size;
  /**
   * Learning rate, at least 0.
   */
  double lr;
  /**
   * At least 0, less than 1.
   */
  double beta1;
  /**
   * At least 0, less than 1.
   */
  double beta2;
  /**
   * At least 0.
   */
  double eps;
  /**
   * At least 0.
   */
  double weight_decay;
  /**
   * Not 0: climb instead of descending.
   */
  int32_t maximize;
} fsdp_adamw_config_t;

/**
 * What to plan. Initialize with FSDP_PLAN_REQUEST_INIT, then set what differs.
 */
typedef struct {
  /**
   * sizeof(fsdp_plan_request_t).
   */
  size_t struct_size;
  /**
   * Ranks, 1 to 2^24: any number, whatever a communicator can do today.
   */
  uint32_t world_size;
  /**
   * As in fsdp_engine_config_t.
   */
  int32_t strategy;
  /**
   * As in fsdp_engine_config_t.
   */
  fsdp_dtype_t reduce_dtype;
  /**
   * As in fsdp_engine_config_t.
   */
  uint32_t gradient_slots;
  /**
   * Bytes of optimizer state per element of a trained parameter: 0 for plain SGD, 8 for Adam in float32; at most 4096.
   */
  uint32_t optimizer_bytes_per_element;
  /**
   * Whose bytes to tell: a rank, or FSDP_LARGEST_RANK.
   */
  int32_t rank;
  /**
   * As in fsdp_engine_config_t.
   */
  fsdp_dtype_t param_dtype;
  /**
   * As in fsdp_engine_config_t.
   */
  uint32_t shard_size;
  /**
   * As in fsdp_engine_config_t.
   */
  int32_t cpu_offload;
  /**
   * Where the engine will compute: FSDP_DEVICE_CUDA, or FSDP_DEVICE_CPU or 0.
   */
  int32_t device_type;
  /**
   * On a GPU: as in fsdp_cuda_config_t.
   */
  uint32_t prefetch;
  /**
   * As in fsdp_engine_config_t.
   */
  int32_t grads_in_param_dtype;
} fsdp_plan_request_t;

/**
 * What an engine will use and do. "This rank" is the one asked for; ranks differ in padding and optimizer state only. A
 * step is one forward and one backward through the hooks, in which each unit is used once; a unit that is used k times
 * is gathered k times as often. Set struct_size before the call.
 */
typedef struct {
  /**
   * sizeof(fsdp_plan_t).
   */
  size_t struct_size;
  /**
   * This rank.
   */
  uint32_t rank;
  /**
   * Units, the root included.
   */
  uint32_t unit_count;
  /**
   * Elements of all parameters, tied ones counted once.
   */
  uint64_t numel;
  /**
   * Elements of the parameters that are not frozen.
   */
  uint64_t trained_numel;
  /**
   * As fsdp_stats_t will say.
   */
  uint64_t param_shard_bytes;
  /**
   * As fsdp_stats_t will say.
   */
  uint64_t grad_shard_bytes;
  /**
   * Optimizer state of this rank: optimizer_bytes_per_element for each element of a trained parameter in its shards. What
   * aligns it comes on top: with fsdp_optimizer_t less than 64 bytes per parameter and state.
   */
  uint64_t optimizer_bytes;
  /**
   * As fsdp_stats_t will say.
   */
  uint64_t gradient_slot_bytes;
  /**
   * Bytes of this rank's shards that belong to no parameter.
   */
  uint64_t shard_padding_bytes;
  /**
   * Bytes of all unit buffers that belong to no parameter: the padding of all ranks of a shard group together.
   */
  uint64_t padding_bytes;
  /**
   * As fsdp_stats_t will say: on shm once per host.
   */
  uint64_t unit_buffer_bytes;
  /**
   * Most bytes of unit buffers unsharded at once, parameters that are computed in 16 bits counted so: where units are
   * resharded after their forward the largest sum along a path of nested units, else all. No memory of its own on shm;
   * where bytes move, each rank needs it besides its shards.
   */
  uint64_t unsharded_peak_bytes;
  /**
   * This rank at its peak: its shards, gradient shards, gradient slots and optimizer state.
   */
  uint64_t rank_peak_bytes;
  /**
   * All ranks together, as on shm, where they are on one host: each shard group's unit buffers and copies in 16 bits, and
   * every rank's gradient shards, gradient slots and optimizer state.
   */
  uint64_t host_peak_bytes;
  /**
   * All-gathers of a step.
   */
  uint64_t all_gathers;
  /**
   * Bytes of the unit buffers that they fill, parameters that are computed in 16 bits counted so. On shm they move none
   * of them.
   */
  uint64_t all_gather_bytes;
  /**
   * Bytes of them that each rank sends where bytes move: (world_size - 1) / world_size of each one's, rounded up.
   */
  uint64_t all_gather_sent_bytes;
  /**
   * In so many messages, around a ring: world_size - 1 per all-gather.
   */
  uint64_t all_gather_messages;
  /**
   * Reduce-scatters of a step.
   */
  uint64_t reduce_scatters;
  /**
   * Bytes of the gradients that each rank gives to them. On shm they stay where they are: each rank reads its own range
   * of every rank's, as many bytes in all.
   */
  uint64_t reduce_scatter_bytes;
  /**
   * Bytes that each rank sends where bytes move: (world_size - 1) / world_size of reduce_scatter_bytes.
   */
  uint64_t reduce_scatter_sent_bytes;
  /**
   * In so many messages, around a ring: world_size - 1 per reduce-scatter.
   */
  uint64_t reduce_scatter_messages;
  /**
   * All-reduces of a step, over the replicas of a hybrid or unsharded engine, of float32 means; on a GPU of whole shards.
   */
  uint64_t all_reduces;
  /**
   * Bytes of the gradients that each rank gives to them.
   */
  uint64_t all_reduce_bytes;
  /**
   * Bytes that each rank sends where bytes move: 2 (n - 1) / n of all_reduce_bytes with n replicas.
   */
  uint64_t all_reduce_sent_bytes;
  /**
   * In so many messages, around a ring: 2 (n - 1) per all-reduce.
   */
  uint64_t all_reduce_messages;
  /**
   * As fsdp_stats_t will say: on shm once per host.
   */
  uint64_t compute_buffer_bytes;
  /**
   * As fsdp_stats_t will count for each step after which this rank's shards are written.
   */
  uint64_t all_gather_bytes_moved;
  /**
   * As fsdp_stats_t will say. Part of rank_peak_bytes.
   */
  uint64_t offloaded_bytes;
  /**
   * On a GPU, else 0, as the next: the fixed pool of unit buffers, as fsdp_cuda_stats_t will say. gradient_slot_bytes is of
   * the fixed slots there.
   */
  uint64_t pool_bytes;
  /**
   * This rank's device memory at its peak: pool, gradient slots and, without cpu_offload, shards, gradient shards and
   * optimizer state; as fsdp_cuda_stats_t will say, if nothing is taken beyond the pool. Activations are the host's.
   */
  uint64_t device_peak_bytes;
} fsdp_plan_t;

/**
 * A unit, the same on every rank. Set struct_size before the call.
 */
typedef struct {
  /**
   * sizeof(fsdp_plan_unit_t).
   */
  size_t struct_size;
  /**
   * Number of its module.
   */
  uint32_t module;
  /**
   * Parameters that it owns.
   */
  uint32_t param_count;
  /**
   * Their elements.
   */
  uint64_t numel;
  /**
   * Bytes of the unit buffer: world_size times shard_bytes.
   */
  uint64_t unit_bytes;
  /**
   * Bytes of each rank's shard.
   */
  uint64_t shard_bytes;
  /**
   * Bytes of the unit buffer that belong to no parameter.
   */
  uint64_t padding_bytes;
  /**
   * All-gathers of a step.
   */
  uint64_t all_gathers;
  /**
   * Reduce-scatters of a step: 0 for a unit that is frozen.
   */
  uint64_t reduce_scatters;
  /**
   * Bytes of the gradients that each rank gives to them.
   */
  uint64_t reduce_scatter_bytes;
  /**
   * All-reduces of a step.
   */
  uint64_t all_reduces;
  /**
   * Bytes of the gradients that this rank gives to them.
   */
  uint64_t all_reduce_bytes;
} fsdp_plan_unit_t;

/**
 * Options and state of a gradient scaler, with the meaning that they have in torch.amp.GradScaler; all of it is what a
 * checkpoint should keep. Initialize with FSDP_GRAD_SCALER_CONFIG_INIT, then set what differs.
 *
 * An update multiplies the scale (a float32) by backoff_factor and sets growth_tracker to 0 if any gradient of any rank
 * was not finite; else it adds 1 to growth_tracker, and at growth_interval multiplies the scale by growth_factor, if that
 * is finite, and sets growth_tracker to 0.
 */
typedef struct {
  /**
   * sizeof(fsdp_grad_scaler_config_t).
   */
  size_t struct_size;
  /**
   * What the loss is multiplied by: above 0.
   */
  double scale;
  /**
   * Above 1.
   */
  double growth_factor;
  /**
   * Above 0 and below 1.
   */
  double backoff_factor;
  /**
   * Updates without a non-finite gradient before the scale grows: at least 1.
   */
  uint64_t growth_interval;
  /**
   * How many of them there were since the scale last changed.
   */
  uint64_t growth_tracker;
  /**
   * 0: the scale is 1, nothing is unscaled, every step is made.
   */
  int32_t enabled;
} fsdp_grad_scaler_config_t;

/**
 * This rank's piece of a parameter. The pointers are borrowed until fsdp_engine_destroy; when data may be written is
 * said at fsdp_engine_begin_write. Of an engine on a GPU they are device addresses, to be used on the compute stream; with
 * cpu_offload pinned host memory.
 */
typedef struct {
  /**
   * numel elements.
   */
  float *data;
  /**
   * The mean gradient of the piece, numel elements; NULL while there is none. May be written any time outside
   * backward, e.g. to clip it.
   */
  float *grad;
  /**
   * Elements; may be 0.
   */
  int64_t numel;
} fsdp_shard_t;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Saves all shards and `states` into the new folder `dir`: for each rank a safetensors file (and small ones with what is
 * less than a row of a parameter), and a manifest with checksums, written aside, flushed, and renamed when complete, so
 * that `dir` is complete or absent whenever a process ends. PyTorch's torch.distributed.checkpoint reads `dir` through its
 * HuggingFaceStorageReader; a parameter's state is called "optimizer.STATE:NAME" there. Of the shard groups of
 * FSDP_HYBRID_SHARD and FSDP_NO_SHARD the first one writes.
 * Collective: same `dir` (on a file system all ranks share) and states of the same parameters and names on every rank;
 * a failure on one rank is the error of all. `metadata`: texts to keep with it (rank 0's are kept), NULL for none. All
 * pointers are borrowed for the call. Not during a backward. Errors: FSDP_ERR_CHECKPOINT if `dir` exists,
 * FSDP_ERR_INVALID_STATE while fsdp_checkpoint_save_async saves this engine, FSDP_ERR_IO, FSDP_ERR_OUT_OF_MEMORY for a
 * full disk. Since 0.1.
 *
 * # Safety
 * Strings are NULL or NUL-terminated; `states` points to `state_count` entries whose data are readable, `metadata` to
 * `metadata_count` entries.
 */
fsdp_status_t fsdp_checkpoint_save(fsdp_engine_t *engine,
                                   const char *dir,
                                   const fsdp_state_t *states,
                                   size_t state_count,
                                   const fsdp_metadata_t *metadata,
                                   size_t metadata_count);

/**
 * The same with everything that a checkpoint can hold. Collective. Since 0.1.
 *
 * # Safety
 * `dir` is NULL or NUL-terminated, `contents` is NULL or points to `struct_size` bytes whose arrays are as said there.
 */
fsdp_status_t fsdp_checkpoint_save_contents(fsdp_engine_t *engine,
                                            const char *dir,
                                            const fsdp_checkpoint_contents_t *contents);

/**
 * Fills all shards and the data of `states` from the checkpoint in `dir`, saved at any world size and wrapping of the
 * same model, reading of each file what this rank needs. Collective. Nothing is changed on any rank unless every rank has
 * read and checked all of its part; then it is read again into its place. All pointers are borrowed for the call.
 * Not during a backward. Errors: FSDP_ERR_CHECKPOINT names the file and the parameter if it is absent, incomplete,
 * damaged, or of another model.
 *
 * `dir` may also be a model in Hugging Face's layout: a folder with model.safetensors or model.safetensors.index.json, or
 * such a file itself. It must have every parameter by its original name and in its shape, in float32, float16 or bfloat16
 * (widened without loss), and may have more; it has no states. Files that change or fail after that leave
 * what was being loaded undefined, and the error says so. Since 0.1.
 *
 * # Safety
 * `dir` is NULL or NUL-terminated; `states` points to `state_count` entries whose data are writable.
 */
fsdp_status_t fsdp_checkpoint_load(fsdp_engine_t *engine,
                                   const char *dir,
                                   const fsdp_state_t *states,
                                   size_t state_count);

/**
 * The same with everything that a checkpoint can hold: also fills the optimizer, and the tensors, which must be there
 * with the same names, shapes and dtypes. What the checkpoint has of those besides is left. Collective. Since 0.1.
 *
 * # Safety
 * As for fsdp_checkpoint_save_contents; the data of states and tensors are writable.
 */
fsdp_status_t fsdp_checkpoint_load_contents(fsdp_engine_t *engine,
                                            const char *dir,
                                            const fsdp_checkpoint_contents_t *contents);

/**
 * The text that the checkpoint in `dir` keeps under `key`. *out_size is its size with the terminating NUL, or 0 if there
 * is none; `buffer` of `buffer_size` bytes receives it, or may be NULL to ask for the size. FSDP_ERR_INVALID_ARGUMENT if
 * the buffer is too small, FSDP_ERR_CHECKPOINT if there is no complete checkpoint. Local. Since 0.1.
 *
 * # Safety
 * Strings are NULL or NUL-terminated, `buffer` is NULL or has `buffer_size` writable bytes, `out_size` is NULL or
 * writable.
 */
fsdp_status_t fsdp_checkpoint_metadata(const char *dir,
                                       const char *key,
                                       char *buffer,
                                       size_t buffer_size,
                                       size_t *out_size);

/**
 * As fsdp_checkpoint_save_contents, in the background: returns when this rank's shards, states and tensors are copied in
 * host memory; a thread of its own writes the copy, on a communicator of its own. Training may go on at once; engine,
 * optimizer and communicator may be destroyed. A process that ends before leaves no checkpoint: fsdp_checkpoint_job_wait first.
 *
 * One save at a time: while one of this engine runs, on any rank, further saves of it, in the background or not, are
 * refused on every rank by FSDP_ERR_INVALID_STATE, whose message names the folder that is being written.
 *
 * Collective. *out is owned by the caller: fsdp_checkpoint_job_destroy. Errors here are those that can be seen at once:
 * arguments, FSDP_ERR_CHECKPOINT if `dir` exists, FSDP_ERR_OUT_OF_MEMORY for the copy; the others are the outcome of
 * fsdp_checkpoint_job_wait. Since 0.1.
 *
 * # Safety
 * As for fsdp_checkpoint_save_contents; `out` is NULL or writable.
 */
fsdp_status_t fsdp_checkpoint_save_async(fsdp_engine_t *engine,
                                         const char *dir,
                                         const fsdp_checkpoint_contents_t *contents,
                                         fsdp_checkpoint_job_t **out);

/**
 * Waits until the save has ended on this rank and returns its outcome, the same on every rank. After FSDP_OK the
 * checkpoint is complete and on disk. May be called again. Local. Since 0.1.
 */
fsdp_status_t fsdp_checkpoint_job_wait(fsdp_checkpoint_job_t *job);

/**
 * Sets *out_done to 1 if the save has ended on this rank, well or not, and fsdp_checkpoint_job_wait would not wait, else
 * to 0. Local. Since 0.1.
 *
 * # Safety
 * `out_done` is NULL or writable.
 */
fsdp_status_t fsdp_checkpoint_job_done(const fsdp_checkpoint_job_t *job,
                                       int32_t *out_done);

/**
 * Waits until the save has ended, and frees the job; NULL does nothing. Local. Since 0.1.
 */
void fsdp_checkpoint_job_destroy(fsdp_checkpoint_job_t *job);

/**
 * Makes a communicator of world size 1. Local. *out is owned by the caller: fsdp_comm_destroy. Since 0.1.
 *
 * # Safety
 * `out` is NULL or writable.
 */
fsdp_status_t fsdp_comm_init_single(fsdp_comm_t **out);

/**
 * Joins a job of ranks on this host. Collective: returns when all ranks of the job have joined. Uses abstract unix
 * sockets and memory files: nothing in the file system, nothing left behind however a process ends. *out is owned by
 * the caller: fsdp_comm_destroy. Errors: FSDP_ERR_RENDEZVOUS names missing ranks at the deadline, ranks claimed twice,
 * different world sizes, and a job name in use; a process of another user is refused. Since 0.1.
 *
 * # Safety
 * `config` is NULL or points to `struct_size` readable bytes, `out` is NULL or writable.
 */
fsdp_status_t fsdp_comm_init_shm(const fsdp_shm_config_t *config,
                                 fsdp_comm_t **out);

/**
 * Joins the job that a launcher started this process in, by its environment variables: `fsdp run` and torchrun (RANK,
 * WORLD_SIZE, MASTER_ADDR, MASTER_PORT), Open MPI, Slurm, MPICH. None set: world size 1. FSDP_JOB names the job where
 * the launcher's own variables should not; FSDP_TIMEOUT_MS and FSDP_RENDEZVOUS_TIMEOUT_MS are as in
 * fsdp_shm_config_t. Else as fsdp_comm_init_shm. Errors: FSDP_ERR_INVALID_ARGUMENT names a variable that is missing or
 * no number, FSDP_ERR_UNSUPPORTED says that ranks are on several hosts. Since 0.1.
 *
 * # Safety
 * `out` is NULL or writable.
 */
fsdp_status_t fsdp_comm_init_env(fsdp_comm_t **out);

/**
 * Makes a communicator of the ranks that give the same `color` (0 or more), in the order of (`key`, rank), as
 * MPI_Comm_split does. Collective over `comm`. The result is independent of `comm`: it has its own order of collectives,
 * breaks alone, may be used in another thread, and outlives `comm`. *out is owned by the caller: fsdp_comm_destroy.
 * Errors: as of fsdp_comm_init_shm. Since 0.1.
 *
 * # Safety
 * `out` is NULL or writable.
 */
fsdp_status_t fsdp_comm_split(fsdp_comm_t *comm,
                              int32_t color,
                              int32_t key,
                              fsdp_comm_t **out);

/**
 * This process's rank. Local. Since 0.1.
 *
 * # Safety
 * `out` is NULL or writable.
 */
fsdp_status_t fsdp_comm_rank(const fsdp_comm_t *comm, int32_t *out);

/**
 * Number of ranks. Local. Since 0.1.
 *
 * # Safety
 * `out` is NULL or writable.
 */
fsdp_status_t fsdp_comm_world_size(const fsdp_comm_t *comm, int32_t *out);

/**
 * Returns when every rank has called it. Collective. Since 0.1.
 */
fsdp_status_t fsdp_comm_barrier(fsdp_comm_t *comm);

/**
 * Combines the ranks' tensors in place, in rank order, so that every rank gets the same bits. Collective; blocks.
 * `tensor`: same dtype (float32, float64, float16, bfloat16, int32, int64, uint8) and elements on every rank, borrowed for
 * the call. `op`: FSDP_REDUCE_*. Since 0.1.
 *
 * # Safety
 * `tensor` is NULL or describes memory that this call alone may read and write.
 */
fsdp_status_t fsdp_comm_all_reduce(fsdp_comm_t *comm,
                                   const fsdp_tensor_t *tensor,
                                   int32_t op);

/**
 * Copies rank `root`'s tensor into every rank's. Collective; blocks. `tensor`: same dtype and elements on every rank,
 * borrowed for the call. Since 0.1.
 *
 * # Safety
 * As fsdp_comm_all_reduce.
 */
fsdp_status_t fsdp_comm_broadcast(fsdp_comm_t *comm,
                                  const fsdp_tensor_t *tensor,
                                  int32_t root);

/**
 * Concatenates the ranks' inputs in rank order into every rank's output. Collective; blocks. `output` has world_size
 * times the elements of `input`; both are borrowed for the call and must not overlap (FSDP_ERR_INVALID_ARGUMENT). Since 0.1.
 *
 * # Safety
 * As fsdp_comm_all_reduce, for both tensors.
 */
fsdp_status_t fsdp_comm_all_gather(fsdp_comm_t *comm,
                                   const fsdp_tensor_t *input,
                                   const fsdp_tensor_t *output);

/**
 * Combines the ranks' inputs in rank order and leaves range `rank` of the result in each rank's output. Collective;
 * blocks. `input` has world_size times the elements of `output`; both are borrowed for the call and must not overlap (FSDP_ERR_INVALID_ARGUMENT).
 * Since 0.1.
 *
 * # Safety
 * As fsdp_comm_all_reduce, for both tensors.
 */
fsdp_status_t fsdp_comm_reduce_scatter(fsdp_comm_t *comm,
                                       const fsdp_tensor_t *input,
                                       const fsdp_tensor_t *output,
                                       int32_t op);

/**
 * Breaks the communicator on every rank: their pending and later calls return FSDP_ERR_ABORTED with a message that
 * names this rank and `reason`. Local, from any thread. `reason`: NUL-terminated, borrowed for the call. Since 0.1.
 *
 * # Safety
 * `reason` is NULL or a NUL-terminated string.
 */
fsdp_status_t fsdp_comm_abort(fsdp_comm_t *comm,
                              const char *reason);

/**
 * The error that broke the communicator (a peer's death, an abort), without waiting: returns its status and leaves its
 * message for fsdp_last_error_message; FSDP_OK while it works. Local, from any thread. Since 0.1.
 */
fsdp_status_t fsdp_comm_async_error(const fsdp_comm_t *comm);

/**
 * Leaves the job; NULL does nothing. Local: peers that still wait for this rank get an error that says it has left.
 * Engines made on the communicator keep it until they are destroyed. Since 0.1.
 */
void fsdp_comm_destroy(fsdp_comm_t *comm);

/**
 * Makes a communicator on collectives that the host lends, for any number of ranks on any hosts. Collective: returns when
 * every rank has called it. Parameters are sharded as on shm, but bytes move: a rank's memory holds its shards and the units
 * that are unsharded.
 *
 * Every collective is announced to all ranks before its data moves: a difference is FSDP_ERR_MISMATCH on every rank, a
 * rank that does not come FSDP_ERR_TIMEOUT. Both name unit, collective and ranks. Units must be unsharded and reduced in the same
 * order on every rank whatever order_check says; a rank that ends its backward takes part without gradients in
 * what the others still reduce.
 *
 * `callbacks` is copied. `user_data` is used until `release` is called: when the communicator and all engines on it are
 * destroyed. If this function fails, `release` is not called for it. *out is owned by the caller: fsdp_comm_destroy. Errors:
 * FSDP_ERR_INVALID_ARGUMENT names a callback that is missing. Since 0.1.
 *
 * # Safety
 * `config` and `callbacks` are NULL or point to `struct_size` readable bytes; the callbacks do what fsdp_host_collectives_t
 * says, with `user_data`; `out` is NULL or writable.
 */
fsdp_status_t fsdp_comm_init_host(const fsdp_host_comm_config_t *config,
                                  const fsdp_host_collectives_t *callbacks,
                                  void *user_data,
                                  fsdp_comm_t **out);

/**
 * Writes parameters and tensors of the checkpoint in `dir`, whole and under their original names, into the new folder
 * `out_dir`, as Hugging Face's libraries (and PyTorch's HuggingFaceStorageReader, and fsdp_checkpoint_load) read them:
 * model.safetensors, or model-0000i-of-0000n.safetensors and model.safetensors.index.json. States and texts stay behind;
 * tensors that are no parameters keep their dtype. Complete or absent, as fsdp_checkpoint_save; every checksum is compared;
 * memory for 4 MiB at a time. `dir` may be in that layout already, to be cut or rounded anew: its floating tensors then
 * all count as parameters. `config` may be NULL for the defaults. Local: one process does it, without ranks.
 * Errors: FSDP_ERR_CHECKPOINT names file and parameter if the checkpoint is damaged, a number is too large for float16, or
 * `out_dir` exists; FSDP_ERR_IO; FSDP_ERR_OUT_OF_MEMORY for a full disk. Since 0.1.
 *
 * # Safety
 * Strings are NULL or NUL-terminated; `config` is NULL or points to `struct_size` readable bytes.
 */
fsdp_status_t fsdp_checkpoint_consolidate(const char *dir,
                                          const char *out_dir,
                                          const fsdp_consolidate_config_t *config);

/**
 * What the host launches from here on for this engine, it launches on `stream` (NULL: the legacy default stream): the new
 * stream starts after what the one before has been given so far. Call it before the engine's other functions where the
 * host's current stream may have changed (another thread, backward); nothing happens if it is the same. FSDP_ERR_UNSUPPORTED
 * for an engine on the CPU, FSDP_ERR_INVALID_ARGUMENT for cudaStreamPerThread. Local; does not wait. Since 0.1.
 *
 * # Safety
 * `stream` is a stream of the engine's GPU as long as the engine and its optimizers live.
 */
fsdp_status_t fsdp_engine_set_compute_stream(fsdp_engine_t *engine,
                                             void *stream);

/**
 * The error that has broken the engine's communicators, if there is one; on a GPU it looks for failures of peers and for
 * collectives that are late, as every hook does. For a host that waits for the GPU by itself. Local; does not wait. Since 0.1.
 */
fsdp_status_t fsdp_engine_async_error(fsdp_engine_t *engine);

/**
 * Waits until the GPU has done what this engine has given it, with the deadline of its collectives; an error names unit, rank
 * and collective. Nothing to do on the CPU. Local. Since 0.1.
 */
fsdp_status_t fsdp_engine_synchronize(fsdp_engine_t *engine);

/**
 * What the engine has taken on its GPU and done there. FSDP_ERR_UNSUPPORTED for an engine on the CPU. Local. Since 0.1.
 *
 * # Safety
 * `out` is NULL or points to `struct_size` writable bytes.
 */
fsdp_status_t fsdp_engine_cuda_stats(const fsdp_engine_t *engine,
                                     fsdp_cuda_stats_t *out);

/**
 * How many devices of a type, FSDP_DEVICE_*, this process sees: one CPU; GPUs perhaps none. The first question about GPUs
 * loads CUDA's driver; without one the answer is FSDP_ERR_UNSUPPORTED, with a message that says what was looked for and
 * where. Local. Since 0.1.
 *
 * # Safety
 * `out_count` is NULL or writable.
 */
fsdp_status_t fsdp_device_count(int32_t device_type,
                                int32_t *out_count);

/**
 * Shards a model over the ranks of `comm`: copies this rank's cut of every parameter; the host's own memory is not
 * needed afterwards. Parameters without storage are initialized first, one unit at a time, in private memory that is
 * released before the next unit: every rank runs every initializer, so seed them alike. An initializer that fails, or
 * leaves an element untouched, on one rank is the same error on every rank. Collective: same model, wrapping and configuration on every rank, else FSDP_ERR_MISMATCH names
 * the first parameter that differs. `config` may be NULL for the defaults. `model` and `comm` stay the caller's and may
 * be destroyed while the engine lives. *out is owned by the caller: fsdp_engine_destroy. Since 0.1.
 *
 * # Safety
 * The data of every parameter of `model` is readable; `config` is NULL or points to `struct_size` readable bytes; `out`
 * is NULL or writable.
 */
fsdp_status_t fsdp_engine_create(const fsdp_model_t *model,
                                 fsdp_comm_t *comm,
                                 const fsdp_engine_config_t *config,
                                 fsdp_engine_t **out);

/**
 * Frees the engine and this rank's shards; NULL does nothing. Local. All pointers got from it end here. An optimizer
 * of it keeps the shards' memory until it is destroyed too. Since 0.1.
 */
void fsdp_engine_destroy(fsdp_engine_t *engine);

/**
 * Number of units; unit 0 is the root, the others follow in depth-first order of the module tree. Local. Since 0.1.
 *
 * # Safety
 * `out` is NULL or writable.
 */
fsdp_status_t fsdp_engine_unit_count(const fsdp_engine_t *engine,
                                     uint32_t *out);

/**
 * Number of parameters, tied ones counted once; numbers are those of the model. Local. Since 0.1.
 *
 * # Safety
 * `out` is NULL or writable.
 */
fsdp_status_t fsdp_engine_param_count(const fsdp_engine_t *engine, uint32_t *out);

/**
 * Describes a unit. Local. Since 0.1.
 *
 * # Safety
 * `out` is NULL or points to `struct_size` writable bytes.
 */
fsdp_status_t fsdp_engine_unit_info(const fsdp_engine_t *engine,
                                    uint32_t unit,
                                    fsdp_unit_info_t *out);

/**
 * Describes a parameter. Local. Since 0.1.
 *
 * # Safety
 * `out` is NULL or points to `struct_size` writable bytes.
 */
fsdp_status_t fsdp_engine_param_info(const fsdp_engine_t *engine,
                                     uint32_t param,
                                     fsdp_param_info_t *out);

/**
 * Describes the engine as JSON, for people and tools: rank, world_size, shard_group_size,
 * replica, strategy; stats (the fields of fsdp_stats_t);
 * units, each with name, state ("sharded" or "unsharded"), unit_bytes, shard_bytes, all_gathers, reduce_scatters, and
 * params, each with name, shape, unit_offset, shard_offset, shard_numel, requires_grad, has_grad. Later versions may add
 * fields. *out_size is its size with the terminating NUL; `buffer` of `buffer_size` bytes receives it, or may be NULL to
 * ask for the size. FSDP_ERR_INVALID_ARGUMENT if the buffer is too small. Local. Since 0.1.
 *
 * # Safety
 * `buffer` is NULL or has `buffer_size` writable bytes; `out_size` is NULL or writable.
 */
fsdp_status_t fsdp_engine_describe(const fsdp_engine_t *engine,
                                   char *buffer,
                                   size_t buffer_size,
                                   size_t *out_size);

/**
 * The unit that a module belongs to: itself if it was wrapped, else its nearest wrapped ancestor. Local. Since 0.1.
 *
 * # Safety
 * `out_unit` is NULL or writable.
 */
fsdp_status_t fsdp_engine_unit_of_module(const fsdp_engine_t *engine,
                                         uint32_t module,
                                         uint32_t *out_unit);

/**
 * What the engine uses and has done so far. Local. Since 0.1.
 *
 * # Safety
 * `out` is NULL or points to `struct_size` writable bytes.
 */
fsdp_status_t fsdp_engine_stats(const fsdp_engine_t *engine, fsdp_stats_t *out);

/**
 * Opens a scope that holds the full float32 parameters of some units in host memory of its own (a copy: as much as the
 * units have, on every rank or on rank 0). Ends a forward that no backward followed. No iteration can begin until the
 * scope is closed; another scope cannot be opened. `units`: `unit_count` numbers of units, or NULL for all; `config` may be
 * NULL. Collective: the same on every rank, else FSDP_ERR_MISMATCH. FSDP_ERR_INVALID_STATE in a backward, or while a scope
 * is open. *out is owned by the caller: fsdp_full_params_destroy. As summon_full_params in PyTorch. Since 0.1.
 *
 * # Safety
 * `units` is NULL or `unit_count` readable numbers; `config` is NULL or points to `struct_size` readable bytes; `out` is
 * NULL or writable.
 */
fsdp_status_t fsdp_full_params_open(fsdp_engine_t *engine,
                                    const uint32_t *units,
                                    size_t unit_count,
                                    const fsdp_full_params_config_t *config,
                                    fsdp_full_params_t **out);

/**
 * The full value of a parameter, readable and writable until the scope is closed: contiguous float32 of its shape; data is
 * NULL where only rank 0 holds it. FSDP_ERR_INVALID_ARGUMENT if its unit is not in the scope. Local. Since 0.1.
 *
 * # Safety
 * `out` is NULL or writable.
 */
fsdp_status_t fsdp_full_params_data(const fsdp_full_params_t *full,
                                    uint32_t param,
                                    fsdp_tensor_t *out);

/**
 * The same for its full gradient; data is NULL, too, where it has none or the scope is without gradients. Local. Since 0.1.
 *
 * # Safety
 * `out` is NULL or writable.
 */
fsdp_status_t fsdp_full_params_grad(const fsdp_full_params_t *full,
                                    uint32_t param,
                                    fsdp_tensor_t *out);

/**
 * Ends the scope and frees its memory, after writing back what it holds if it was opened so; all pointers got from it end
 * here. Collective with writeback, else local; the second time nothing happens. Since 0.1.
 */
fsdp_status_t fsdp_full_params_close(fsdp_full_params_t *full);

/**
 * Frees the handle; NULL does nothing. A scope that is open ends without writing back. Local. Since 0.1.
 */
void fsdp_full_params_destroy(fsdp_full_params_t *full);

/**
 * Calls `fn_` with every full parameter, gathered one unit at a time: a full state dict. Units in order, in each the
 * parameters in order of registration. Ends a forward that no backward followed. With `rank0_only` the other ranks only take
 * part. An error of `fn_` on one rank is FSDP_ERR_CALLBACK on every rank. FSDP_ERR_INVALID_STATE in a backward. Collective.
 * Since 0.1.
 *
 * # Safety
 * `fn_` may be called with `user_data`.
 */
fsdp_status_t fsdp_engine_full_state(fsdp_engine_t *engine,
                                     int32_t rank0_only,
                                     fsdp_full_state_fn fn_,
                                     void *user_data);

/**
 * Calls `fn_` with every state of every parameter that has taken a step, gathered one at a time, in the order of parameters.
 * Otherwise as fsdp_engine_full_state; counts of steps are fsdp_optimizer_step_count's. Collective. Since 0.1.
 *
 * # Safety
 * `fn_` may be called with `user_data`.
 */
fsdp_status_t fsdp_optimizer_full_state(fsdp_optimizer_t *optimizer,
                                        int32_t rank0_only,
                                        fsdp_full_state_fn fn_,
                                        void *user_data);

/**
 * Gathers a float32 tensor of the host's that is sharded like a parameter (an optimizer's state): each rank gives its piece of
 * fsdp_shard_t.numel floats and gets the whole, the parameter's numel floats, row-major. Collective over the shard group.
 * FSDP_ERR_INVALID_STATE on every rank if one has no piece (NULL) where it has elements. Since 0.1.
 *
 * # Safety
 * `piece` is NULL or readable, `out` writable for so many floats.
 */
fsdp_status_t fsdp_engine_gather(fsdp_engine_t *engine,
                                 uint32_t param,
                                 const float *piece,
                                 float *out);

/**
 * A block of at least `bytes` in this process's heap of huge pages, which has gradient shards as well: a host that has its
 * activations there needs less memory in all, since they go while gradients come. Aligned to 64 bytes, contents undefined, of one
 * owner, who gives it back with fsdp_heap_release. Meant for blocks of 64 KiB and more: each takes whole pages. What was
 * released stays with the process for the next blocks, as much as lived at once, until fsdp_heap_trim or until an engine is
 * destroyed. Local; any thread. FSDP_ERR_OUT_OF_MEMORY where addresses for the heap could not be reserved (`ulimit -v`) or are used up:
 * twice the machine's memory. Since 0.1.
 *
 * # Safety
 * `out_block` is NULL or writable.
 */
fsdp_status_t fsdp_heap_alloc(size_t bytes,
                              void **out_block);

/**
 * Makes the caller an owner of the block that `address` lies in: 1, or 0 if it lies in none. On the CPU a unit's
 * gradient shards of 64 KiB and more are in one from when fsdp_engine_shard says where they are until all of them are cleared; an owner
 * keeps their memory beyond that. Smaller ones have a fixed place and are in none. Local; any thread. Since 0.1.
 */
int32_t fsdp_heap_retain(const void *address);

/**
 * Gives up a share in the block that `address` lies in: 1, or 0 if it lies in none. The last owner frees it. Local; any thread.
 * Since 0.1.
 */
int32_t fsdp_heap_release(const void *address);

/**
 * Gives what is free in the heap back to the system. Destroying an engine does, too. Local; any thread. Since 0.1.
 */
void fsdp_heap_trim(void);

/**
 * What the heap has now. Zero before its first block. Local; any thread. Since 0.1.
 *
 * # Safety
 * `out_stats` is NULL or writable for its struct_size.
 */
fsdp_status_t fsdp_heap_stats(fsdp_heap_stats_t *out_stats);

/**
 * Calls `fn` on this rank with each unit's gradients just before they are reduced: all uses summed, float32 (with
 * grads_in_param_dtype and on a GPU, too), before they are rounded to reduce_dtype and before they are averaged over the ranks. Not called for a unit of which this rank has
 * no gradient. Once a reduction: a unit that is reduced twice in a backward is seen twice, each time with what came
 * since. NULL: no hook, as at first. A hook that fails makes the call that it was called by fail with
 * FSDP_ERR_CALLBACK, naming the unit, and aborts the communicator, so that every other rank gets FSDP_ERR_ABORTED with
 * that message instead of waiting. Local; ranks may have different hooks. From the next reduction on. Since 0.1.
 *
 * # Safety
 * `fn_` is NULL or a function that may be called with `user_data` until it is replaced or the engine is destroyed.
 */
fsdp_status_t fsdp_engine_set_comm_hook(fsdp_engine_t *engine,
                                        fsdp_comm_hook_fn fn_,
                                        void *user_data);

/**
 * What happens to a unit after a forward that a backward follows: FSDP_RESHARD_DEFAULT, _NEVER, _ALWAYS, or a number of
 * ranks from 2 on: the unit is resharded over groups of so many consecutive ranks, so that its all-gather in backward
 * stays within a group (on shm it moves nothing in any case). The number divides that of the shard group; all of them is
 * as _ALWAYS. From the next iteration on. Collective: the same on every rank, else FSDP_ERR_MISMATCH;
 * FSDP_ERR_INVALID_STATE in an iteration. As fully_shard's reshard_after_forward in PyTorch. Since 0.1.
 */
fsdp_status_t fsdp_engine_set_reshard_after_forward(fsdp_engine_t *engine,
                                                    uint32_t unit,
                                                    int32_t reshard_after_forward);

/**
 * The host reads this unit's parameters no more until a backward does: reshards it as fsdp_engine_set_reshard_after_forward
 * says, which fsdp_engine_post_forward does by itself. Local. Since 0.1.
 */
fsdp_status_t fsdp_engine_reshard_after_forward(fsdp_engine_t *engine,
                                                uint32_t unit);

/**
 * Whether backwards from here on reduce their gradients (1, the default). With 0 a backward leaves each unit's full gradients
 * where they are, and later ones add to them, until one that reduces: it reduces all that has come together. Costs memory
 * for the full gradients of every unit (in its spare gradient slot), saves the reductions; PyTorch's no_sync. With 1,
 * accumulation is in shards: every backward reduces, and adds to what fsdp_engine_zero_grad has not cleared. The same on
 * every rank: FSDP_ERR_MISMATCH at the end of the backward where it is not. Gradients are kept over forwards without
 * backward; fsdp_engine_zero_grad drops them. Local. Since 0.1.
 */
fsdp_status_t fsdp_engine_set_requires_gradient_sync(fsdp_engine_t *engine,
                                                     int32_t required);

/**
 * Whether backwards from here on end the iteration (1, the default). With 0 the end of a backward waits for no rank and
 * for no reduction, units can be unsharded again at once, and shards cannot be written: gradient shards are undefined until
 * a backward with 1 has ended. For the micro-batches of a step, all but the last. The same on every rank. Local. Since 0.1.
 */
fsdp_status_t fsdp_engine_set_is_last_backward(fsdp_engine_t *engine,
                                               int32_t last);

/**
 * Whether backwards from here on average their gradients over the replicas of a hybrid or unsharded engine (1, the default).
 * With 0 they are reduced within the shard group only; the next backward with 1 averages all that has come together. The
 * same on every rank. No effect where all ranks are one shard group. Local. Since 0.1.
 */
fsdp_status_t fsdp_engine_set_requires_all_reduce(fsdp_engine_t *engine,
                                                  int32_t required);

/**
 * Says whether a backward follows the forwards from here on (default: 1). With 0 the root's post_forward ends the
 * iteration. Local. Since 0.1.
 */
fsdp_status_t fsdp_engine_set_grad_enabled(fsdp_engine_t *engine,
                                           int32_t enabled);

/**
 * Freezes or trains a parameter from the next iteration on: a frozen one gets no gradients (fsdp_engine_param_grad
 * refuses it). FSDP_ERR_INVALID_STATE while gradients are being collected. Local; may differ between ranks: those that
 * have no gradient for it count as zero. Since 0.1.
 */
fsdp_status_t fsdp_engine_set_requires_grad(fsdp_engine_t *engine,
                                            uint32_t param,
                                            int32_t requires_grad);

/**
 * Issues the all-gather of each unit when the one before it in the order of `trace` is unsharded (in backward: in the
 * reverse order). A unit that turns out not to be needed has been gathered in vain. Give the same trace on every rank,
 * between iterations; it is not needed afterwards. FSDP_ERR_INVALID_ARGUMENT for a trace of a model of another shape.
 * Local. Since 0.1.
 */
fsdp_status_t fsdp_engine_set_prefetch_order(fsdp_engine_t *engine,
                                             const fsdp_trace_t *trace);

/**
 * Says that a forward of the whole model begins. Units that the last one left unsharded are resharded. The order of
 * unshards up to fsdp_engine_end_forward is recorded if `training` is not 0 and this is the first, else compared with the
 * first (order_check). Not needed by hosts that call pre_forward of the root, which begins a forward by itself
 * (training: as fsdp_engine_set_grad_enabled says). Local. Since 0.1.
 */
fsdp_status_t fsdp_engine_begin_forward(fsdp_engine_t *engine,
                                        int32_t training);

/**
 * Says that the forward has ended: what is unsharded from here on is for a backward. Not needed by hosts that call
 * post_forward of the root. Local. Since 0.1.
 */
fsdp_status_t fsdp_engine_end_forward(fsdp_engine_t *engine);

/**
 * Call before a unit's forward, in the same order on every rank: unshards the unit. A unit may be used several times
 * and nested in itself. Collective. Since 0.1.
 */
fsdp_status_t fsdp_engine_pre_forward(fsdp_engine_t *engine,
                                      uint32_t unit);

/**
 * Call after a unit's forward: reshards it or, when a backward follows, does what fsdp_engine_set_reshard_after_forward says.
 * FSDP_ERR_INVALID_STATE without a pre_forward. Local. Since 0.1.
 */
fsdp_status_t fsdp_engine_post_forward(fsdp_engine_t *engine,
                                       uint32_t unit);

/**
 * Call before the backward of each use of a unit: unshards it. FSDP_ERR_INVALID_STATE without a forward that had
 * gradients enabled. Collective. Since 0.1.
 */
fsdp_status_t fsdp_engine_pre_backward(fsdp_engine_t *engine,
                                       uint32_t unit);

/**
 * Call after the backward of each use of a unit. After that of its last use, its gradients (all uses summed) are
 * reduced to their mean over the ranks (a rank may have none) and the unit is resharded. The root's ends the iteration: when it returns, every
 * gradient is in its shard and this rank may write its shards. Collective. Since 0.1.
 */
fsdp_status_t fsdp_engine_post_backward(fsdp_engine_t *engine,
                                        uint32_t unit);

/**
 * Unshards a unit; nothing happens if it is unsharded already. *out_unit_buffer is the unit buffer (NULL for a unit
 * without elements), readable until the unit is resharded; it is at the same address every time. Collective. For hosts
 * that see parameters being touched instead of modules being entered. On a GPU: a device address, another one each time,
 * that work given to the compute stream from here on may read; fsdp_unit_info_t.buffer_bytes long. Since 0.1.
 *
 * # Safety
 * `out_unit_buffer` is NULL or writable.
 */
fsdp_status_t fsdp_engine_unshard(fsdp_engine_t *engine,
                                  uint32_t unit,
                                  void **out_unit_buffer);

/**
 * Reshards a unit; nothing happens if it is sharded already. Local. Since 0.1.
 */
fsdp_status_t fsdp_engine_reshard(fsdp_engine_t *engine, uint32_t unit);

/**
 * Starts the reduction of the gradients collected for a unit; a rank that has none takes part with none. More gradients
 * may come later in the same backward: they are reduced again, and added. Collective: same order on every rank.
 * FSDP_ERR_INVALID_STATE if nothing was unsharded since the last iteration ended. Since 0.1.
 */
fsdp_status_t fsdp_engine_reduce(fsdp_engine_t *engine,
                                 uint32_t unit);

/**
 * Ends an iteration that has no backward: reshards all units and drops gradients being collected. Waits for reductions
 * that were started, else local. Since 0.1.
 */
fsdp_status_t fsdp_engine_finish_forward(fsdp_engine_t *engine);

/**
 * Ends a backward: reduces what is left, and returns when every gradient is in its shard, all units are resharded, and
 * this rank may write its shards. On a GPU that holds for work that the compute stream is given from here on; with
 * cpu_offload it waits for the GPU, and holds for the host. Collective. Since 0.1.
 */
fsdp_status_t fsdp_engine_finish_backward(fsdp_engine_t *engine);

/**
 * From its return until the next unshard this rank may write the data of its shards. Needed for writes that do not
 * follow a backward (loading, clamping, averaging weights): it ends a forward without backward and waits until no rank
 * reads any more. Collective; returns at once after a backward. FSDP_ERR_INVALID_STATE during a backward. On a GPU it is
 * local, and says so for work that the compute stream is given from here on (with cpu_offload: for the host). Since 0.1.
 */
fsdp_status_t fsdp_engine_begin_write(fsdp_engine_t *engine);

/**
 * Messages below this level, FSDP_LOG_*, are not made from now on, in the whole process; FSDP_LOG_OFF: none are. At first
 * the environment variable FSDP_LOG says it: debug, info, warning or off; FSDP_LOG_WARNING without it. Local.
 * Since 0.1.
 */
fsdp_status_t fsdp_set_log_level(int32_t level);

/**
 * Sends the messages of this process to `fn` from now on, with `user_data` untouched; NULL: back to the default, a
 * line "fsdp: warning: ..." each on standard error. The function before it may still be running in another thread when
 * this returns. Local. Since 0.1.
 *
 * # Safety
 * `fn_` is NULL or a function that may be called with `user_data` from any thread until it is replaced.
 */
void fsdp_set_log_callback(fsdp_log_fn fn_,
                           void *user_data);

/**
 * Makes a model that has its root module only: number 0, name "". `class_name` is borrowed for the call. *out is owned
 * by the caller: fsdp_model_destroy. Local. Since 0.1.
 *
 * # Safety
 * `class_name` is NULL or a NUL-terminated string, `out` is NULL or writable.
 */
fsdp_status_t fsdp_model_create(const char *class_name,
                                fsdp_model_t **out);

/**
 * Adds a module below `parent`; *out_module is its number. `name` has no dots and is unique below its parent; both
 * strings are borrowed for the call. Register in the same order on every rank. Local. Since 0.1.
 *
 * # Safety
 * The strings are NULL or NUL-terminated, `out_module` is NULL or writable.
 */
fsdp_status_t fsdp_model_add_module(fsdp_model_t *model,
                                    uint32_t parent,
                                    const char *name,
                                    const char *class_name,
                                    uint32_t *out_module);

/**
 * Adds a parameter that `module` owns; *out_param is its number. `tensor`: contiguous float32, float16 or
 * bfloat16 in host memory, or on the GPU that the engine will be on (what is written there is on the engine's compute stream
 * by then); its data is borrowed until the last fsdp_engine_create on this model has returned, shape and
 * name for the call. Shards are float32 whatever the dtype (16 bits are widened exactly); it is what the parameter is
 * computed in, if nothing says otherwise (fsdp_model_set_param_dtype). data NULL:
 * the parameter has no storage; fsdp_engine_create gives it its values, one unit at a time, by the engine's
 * param_init_fn, else fsdp_model_set_param_init, else fsdp_model_set_reset. `requires_grad`: 0 for a frozen parameter.
 * Local. Errors: FSDP_ERR_UNSUPPORTED for other dtypes, devices and layouts. Since 0.1.
 *
 * # Safety
 * `name` is NULL or NUL-terminated, `tensor` is NULL or readable, `out_param` is NULL or writable.
 */
fsdp_status_t fsdp_model_add_parameter(fsdp_model_t *model,
                                       uint32_t module,
                                       const char *name,
                                       const fsdp_tensor_t *tensor,
                                       int32_t requires_grad,
                                       uint32_t *out_param);

/**
 * Registers an existing parameter again, in `module` under `name` (borrowed for the call): a tied parameter. It is
 * sharded once, in the innermost unit that contains all modules which use it. Local. Since 0.1.
 *
 * # Safety
 * `name` is NULL or NUL-terminated.
 */
fsdp_status_t fsdp_model_tie_parameter(fsdp_model_t *model,
                                       uint32_t module,
                                       const char *name,
                                       uint32_t param);

/**
 * Sets what initializes the parameters without storage that `module` was the first to register, in place of an earlier
 * function. fsdp_engine_create calls it once on every rank, with those that have no initializer of their own; units in
 * order, within a unit modules in order of registration. A module without any parameter is called too, with none: the
 * place to fill buffers. A module whose parameters all have storage is not. If the engine has a param_init_fn, that one is
 * called instead. `fn` and `user_data` (passed on untouched) must stay valid until the last fsdp_engine_create on this
 * model has returned. Local. Since 0.1.
 *
 * # Safety
 * `fn_` is NULL or a function that may be called with `user_data`, from any thread.
 */
fsdp_status_t fsdp_model_set_reset(fsdp_model_t *model,
                                   uint32_t module,
                                   fsdp_module_init_fn fn_,
                                   void *user_data);

/**
 * Sets what initializes one parameter without storage, in place of an earlier function; it comes before its module's
 * reset function. FSDP_ERR_INVALID_ARGUMENT for a parameter with storage. Otherwise as fsdp_model_set_reset. Since
 * 0.1.
 *
 * # Safety
 * `fn_` is NULL or a function that may be called with `user_data`, from any thread.
 */
fsdp_status_t fsdp_model_set_param_init(fsdp_model_t *model,
                                        uint32_t param,
                                        fsdp_param_init_fn fn_,
                                        void *user_data);

/**
 * Makes `module` a unit. FSDP_ERR_INVALID_STATE if it is one already (the root always is). Local. Since 0.1.
 */
fsdp_status_t fsdp_model_wrap_module(fsdp_model_t *model,
                                     uint32_t module);

/**
 * Makes every module a unit, like PyTorch's always_wrap_policy. Local. Since 0.1.
 */
fsdp_status_t fsdp_model_wrap_always(fsdp_model_t *model);

/**
 * Makes every module of the class a unit, like PyTorch's ModuleWrapPolicy. FSDP_ERR_INVALID_ARGUMENT if there is none.
 * `class_name` is borrowed for the call. Local. Since 0.1.
 *
 * # Safety
 * `class_name` is NULL or NUL-terminated.
 */
fsdp_status_t fsdp_model_wrap_class(fsdp_model_t *model,
                                    const char *class_name);

/**
 * Children first, makes a module a unit whose parameters not yet in a nested unit have at least `min_numel` (1 or
 * more) elements, like PyTorch's size_based_auto_wrap_policy. Local. Since 0.1.
 */
fsdp_status_t fsdp_model_wrap_size(fsdp_model_t *model,
                                   uint64_t min_numel);

/**
 * As fsdp_model_wrap_size, but only modules that the trace entered become units, and only parameters that it used
 * count. The trace is of this model, complete (FSDP_ERR_INVALID_STATE), and not needed afterwards. Local. Since 0.1.
 */
fsdp_status_t fsdp_model_wrap_trace(fsdp_model_t *model,
                                    const fsdp_trace_t *trace,
                                    uint64_t min_numel);

/**
 * Makes every module a unit for which `fn` says so, like PyTorch's CustomPolicy. If `fn` stops, no module is wrapped.
 * `user_data` is passed on untouched. Local. Since 0.1.
 *
 * # Safety
 * `fn_` is NULL or a function that may be called with `user_data`.
 */
fsdp_status_t fsdp_model_wrap_if(fsdp_model_t *model,
                                 fsdp_wrap_fn fn_,
                                 void *user_data);

/**
 * Adds the whole module tree of an existing engine below `parent` as `name` (borrowed for the call; with "" its
 * modules and parameters keep their own names below the parent's): a model that is sharded already becomes a part of a
 * bigger one. Its modules get the numbers *out_module, *out_module + 1, ... and its parameters *out_param, ..., in
 * their old order; its units stay units, and values and gradients stay where they are: engines made of this model
 * share them with `engine`, which may be destroyed. Only one of these engines may be in an iteration at a time
 * (FSDP_ERR_INVALID_STATE). FSDP_ERR_INVALID_STATE if the engine is a part of this model already. Local. Since 0.1.
 *
 * # Safety
 * `name` is NULL or NUL-terminated, `out_module` and `out_param` are NULL or writable.
 */
fsdp_status_t fsdp_model_add_sharded(fsdp_model_t *model,
                                     uint32_t parent,
                                     const char *name,
                                     const fsdp_engine_t *engine,
                                     uint32_t *out_module,
                                     uint32_t *out_param);

/**
 * Overrides the types of the unit that `module` is, or will be when an engine is made (an error then if it is none):
 * `param_dtype`, what its parameters are computed in, and `reduce_dtype`, what its gradients are rounded to before they
 * are summed. Each is float32, float16, bfloat16, or {0, 0, 0} for the engine's own (fsdp_engine_config_t); a later call
 * replaces both. The same on every rank. Errors: FSDP_ERR_UNSUPPORTED for other dtypes, FSDP_ERR_INVALID_STATE for
 * another param_dtype than that of a unit that is sharded already. Local. Since 0.1.
 */
fsdp_status_t fsdp_model_set_unit_dtypes(fsdp_model_t *model,
                                         uint32_t module,
                                         fsdp_dtype_t param_dtype,
                                         fsdp_dtype_t reduce_dtype);

/**
 * Overrides the type that a parameter is computed in, before that of its unit and of the engine: float32, float16,
 * bfloat16, or {0, 0, 0} for no override. The same on every rank. Errors as for fsdp_model_set_unit_dtypes. Local. Since
 * 0.1.
 */
fsdp_status_t fsdp_model_set_param_dtype(fsdp_model_t *model,
                                         uint32_t param,
                                         fsdp_dtype_t dtype);

/**
 * Frees the model; NULL does nothing. Engines made from it live on. Local. Since 0.1.
 */
void fsdp_model_destroy(fsdp_model_t *model);

/**
 * The norm of order `p` of the gradients over all parameters and ranks: the norm of the parameters' norms, a parameter
 * counted once, one without a gradient on every rank not at all (0 if none has one). As torch.nn.utils.get_total_norm,
 * but in float64 throughout:
 *
 *   p = inf, -inf   the largest, the smallest magnitude
 *   p = 0           how many parameters' norms are not 0; such a norm is how many of the elements are not
 *   other p         (sum of |x|^p)^(1/p)
 *
 * A rank sums its piece in an order that depends on its length alone; the ranks' sums are added in rank order, so *out
 * has the same bits on every rank. FSDP_ERR_INVALID_ARGUMENT if p is NaN, or is below 0 and a parameter with a gradient
 * has no elements; FSDP_ERR_INVALID_STATE in the middle of a backward. Collective. Since 0.1.
 *
 * # Safety
 * `out` is NULL or writable.
 */
fsdp_status_t fsdp_engine_grad_norm(fsdp_engine_t *engine,
                                    double p,
                                    double *out);

/**
 * Clips the gradients: multiplies every gradient shard by min(1, max_norm / (norm + 1e-6)), rounded to float32 once, where
 * norm is what fsdp_engine_grad_norm gives; *out_norm is the norm from before. As torch.nn.utils.clip_grad_norm_: an
 * infinite norm makes finite gradients 0 and others NaN, a NaN makes all NaN; with `error_if_nonfinite` not 0 it is
 * FSDP_ERR_NONFINITE instead, on every rank, with a message that names the first parameter whose norm is not finite, and
 * no gradient has changed. FSDP_ERR_INVALID_ARGUMENT also if max_norm is NaN or below 0. Collective. Since 0.1.
 *
 * # Safety
 * `out_norm` is NULL or writable.
 */
fsdp_status_t fsdp_engine_clip_grad_norm(fsdp_engine_t *engine,
                                         double max_norm,
                                         double p,
                                         int32_t error_if_nonfinite,
                                         double *out_norm);

/**
 * The norm of anything that is sharded as the parameters are, defined as for fsdp_engine_grad_norm: `pieces[i]` is this
 * rank's piece of it for parameter i (fsdp_param_info_t.shard_numel floats), or NULL where a parameter has none here;
 * one that is NULL on every rank is not counted. `piece_count` is fsdp_engine_param_count. E.g. the norm of the
 * parameters, or of gradients in a host's own memory. With `error_if_nonfinite` not 0, FSDP_ERR_NONFINITE as for
 * fsdp_engine_clip_grad_norm. Collective. Since 0.1.
 *
 * # Safety
 * `pieces` is NULL or points to `piece_count` pointers as described; `out` is NULL or writable.
 */
fsdp_status_t fsdp_engine_total_norm(fsdp_engine_t *engine,
                                     const float *const *pieces,
                                     size_t piece_count,
                                     double p,
                                     int32_t error_if_nonfinite,
                                     double *out);

/**
 * Makes an optimizer of all parameters of an engine. It keeps its state in float32, for this rank's shards only, from
 * the first step on. `config` may be NULL for the defaults. Collective: same options on every rank, else
 * FSDP_ERR_MISMATCH names the first that differs; FSDP_ERR_INVALID_ARGUMENT names an option out of its limits. Optimizer
 * and engine may be destroyed in either order. *out is owned by the caller: fsdp_optimizer_destroy. Since 0.1.
 *
 * # Safety
 * `config` is NULL or points to `struct_size` readable bytes; `out` is NULL or writable.
 */
fsdp_status_t fsdp_optimizer_create_sgd(fsdp_engine_t *engine,
                                        const fsdp_sgd_config_t *config,
                                        fsdp_optimizer_t **out);

/**
 * The same with AdamW. Since 0.1.
 *
 * # Safety
 * As for fsdp_optimizer_create_sgd.
 */
fsdp_status_t fsdp_optimizer_create_adamw(fsdp_engine_t *engine,
                                          const fsdp_adamw_config_t *config,
                                          fsdp_optimizer_t **out);

/**
 * Frees the optimizer and its state; NULL does nothing. Local. All pointers got from it end here. Since 0.1.
 */
void fsdp_optimizer_destroy(fsdp_optimizer_t *optimizer);

/**
 * Updates this rank's shards from their gradients, which stay: fsdp_engine_zero_grad forgets them. A parameter without a
 * gradient (none on any rank) is left alone and does not count the step. Begins as fsdp_engine_begin_write does: local
 * after a backward; else it ends a forward without backward, and is collective. FSDP_ERR_INVALID_STATE in the middle of
 * a backward; FSDP_ERR_OUT_OF_MEMORY if there is none for the state; nothing has changed then. Since 0.1.
 */
fsdp_status_t fsdp_optimizer_step(fsdp_optimizer_t *optimizer);

/**
 * Sets the learning rate (at least 0) from the next step on. Local; set the same on every rank. Since 0.1.
 */
fsdp_status_t fsdp_optimizer_set_lr(fsdp_optimizer_t *optimizer,
                                    double lr);

/**
 * The learning rate. Local. Since 0.1.
 *
 * # Safety
 * `out` is NULL or writable.
 */
fsdp_status_t fsdp_optimizer_get_lr(const fsdp_optimizer_t *optimizer, double *out);

/**
 * Gives one parameter options of its own from the next step on: its learning rate is `lr_factor` (at first 1) times the
 * optimizer's, its weight decay `weight_decay` (at least 0) instead of the configuration's. E.g. 1 and 0 for biases.
 * Local; set the same on every rank. Since 0.1.
 */
fsdp_status_t fsdp_optimizer_set_param_options(fsdp_optimizer_t *optimizer,
                                               uint32_t param,
                                               double lr_factor,
                                               double weight_decay);

/**
 * How many steps a parameter has taken: those in which it had a gradient. 0 for one without elements. Local. Since 0.1.
 *
 * # Safety
 * `out` is NULL or writable.
 */
fsdp_status_t fsdp_optimizer_step_count(const fsdp_optimizer_t *optimizer,
                                        uint32_t param,
                                        uint64_t *out);

/**
 * The state `name` ("momentum_buffer", "exp_avg", "exp_avg_sq") of this rank's piece of a parameter: *out_data has
 * fsdp_shard_t.numel floats, or is NULL before the parameter's first step. Borrowed until fsdp_optimizer_destroy. Local.
 * FSDP_ERR_INVALID_ARGUMENT if the optimizer has no such state. Since 0.1.
 *
 * # Safety
 * `name` is NULL or NUL-terminated; `out_data` is NULL or writable.
 */
fsdp_status_t fsdp_optimizer_state(const fsdp_optimizer_t *optimizer,
                                   uint32_t param,
                                   const char *name,
                                   float **out_data);

/**
 * Saves a checkpoint of the engine's shards and of this optimizer: its states, and each parameter's count of steps as
 * the text "fsdp.optimizer". Otherwise as fsdp_checkpoint_save: `states` are further ones of the host's. The options
 * (learning rate, ...) are not in it: the host sets them again. fsdp_checkpoint_load reads such a checkpoint's
 * parameters, too. FSDP_ERR_MISMATCH if parameters have not taken the same steps on every rank. Collective. Since 0.1.
 *
 * # Safety
 * As for fsdp_checkpoint_save.
 */
fsdp_status_t fsdp_optimizer_save(fsdp_optimizer_t *optimizer,
                                  const char *dir,
                                  const fsdp_state_t *states,
                                  size_t state_count,
                                  const fsdp_metadata_t *metadata,
                                  size_t metadata_count);

/**
 * Loads what fsdp_optimizer_save has saved, at any world size and wrapping: shards, this optimizer's states and counts,
 * and the data of `states`. With the same options and the same world size, training goes on bit for bit as if it had
 * not stopped. Otherwise as fsdp_checkpoint_load: on an error nothing has changed. FSDP_ERR_CHECKPOINT if it was saved
 * without an optimizer, with another one, or with SGD without the momentum that this one has. Collective. Since 0.1.
 *
 * # Safety
 * As for fsdp_checkpoint_load.
 */
fsdp_status_t fsdp_optimizer_load(fsdp_optimizer_t *optimizer,
                                  const char *dir,
                                  const fsdp_state_t *states,
                                  size_t state_count);

/**
 * Says what an engine on `model`, as it is wrapped by now, would take and move: bytes on a rank and on a host, and the
 * collectives of a training step. Allocates nothing of it; parameters need no storage (data NULL) and no initializer.
 * Takes time by the number of parameters and units, not by world size or elements. Local. Errors:
 * FSDP_ERR_INVALID_ARGUMENT for a rank that the world has not, and for a model with a part that is sharded already over
 * another number of ranks. Since 0.1.
 *
 * # Safety
 * `request` is NULL or points to `struct_size` readable bytes, `out` is NULL or points to `struct_size` writable bytes.
 */
fsdp_status_t fsdp_plan(const fsdp_model_t *model,
                        const fsdp_plan_request_t *request,
                        fsdp_plan_t *out);

/**
 * The same for one unit: 0 is the root, the others follow in depth-first order of the module tree, as in an engine. Plans
 * the whole model on each call. Local. Since 0.1.
 *
 * # Safety
 * As for fsdp_plan.
 */
fsdp_status_t fsdp_plan_unit(const fsdp_model_t *model,
                             const fsdp_plan_request_t *request,
                             uint32_t unit,
                             fsdp_plan_unit_t *out);

/**
 * Makes a gradient scaler; `config` may be NULL for the defaults, which are torch's. Every rank makes one of the same
 * options, and calls its functions alike. Use: multiply the loss by fsdp_grad_scaler_scale; backward;
 * fsdp_grad_scaler_unscale, if the gradients are to be clipped; fsdp_grad_scaler_step; fsdp_grad_scaler_update. One
 * scaler may serve several engines. Local. *out is owned by the caller: fsdp_grad_scaler_destroy. Since 0.1.
 *
 * # Safety
 * `config` is NULL or points to `struct_size` readable bytes; `out` is NULL or writable.
 */
fsdp_status_t fsdp_grad_scaler_create(const fsdp_grad_scaler_config_t *config,
                                      fsdp_grad_scaler_t **out);

/**
 * Frees the scaler; NULL does nothing. Local. Since 0.1.
 */
void fsdp_grad_scaler_destroy(fsdp_grad_scaler_t *scaler);

/**
 * What the loss is to be multiplied by: a float32; 1 if the scaler is not enabled. Local. Since 0.1.
 *
 * # Safety
 * `out` is NULL or writable.
 */
fsdp_status_t fsdp_grad_scaler_scale(const fsdp_grad_scaler_t *scaler,
                                     double *out);

/**
 * Multiplies the engine's gradient shards by the inverse of the scale, rounded to float32. *out_found_inf is 1 if any
 * element of any rank was infinite or NaN before, on every rank, else 0. With `pieces` not NULL those are unscaled
 * instead: `piece_count` (fsdp_engine_param_count) pointers to this rank's pieces, NULL where a parameter has no gradient
 * here. FSDP_ERR_INVALID_STATE in the middle of a backward, and when called twice for an engine before an update;
 * FSDP_ERR_MISMATCH if ranks have different scales, and then nothing has changed. Collective. Since 0.1.
 *
 * # Safety
 * `pieces` is NULL or points to `piece_count` pointers as described; `out_found_inf` is NULL or writable.
 */
fsdp_status_t fsdp_grad_scaler_unscale(fsdp_grad_scaler_t *scaler,
                                       fsdp_engine_t *engine,
                                       float *const *pieces,
                                       size_t piece_count,
                                       int32_t *out_found_inf);

/**
 * Asks whether a host's own optimizer is to step: unscales as fsdp_grad_scaler_unscale does, unless that has been called;
 * *out_step is 0 on every rank if any gradient of any rank was not finite, else 1. Once before an update. Otherwise as
 * fsdp_grad_scaler_unscale. Collective. Since 0.1.
 *
 * # Safety
 * As for fsdp_grad_scaler_unscale.
 */
fsdp_status_t fsdp_grad_scaler_may_step(fsdp_grad_scaler_t *scaler,
                                        fsdp_engine_t *engine,
                                        float *const *pieces,
                                        size_t piece_count,
                                        int32_t *out_step);

/**
 * Asks fsdp_grad_scaler_may_step, and if so calls fsdp_optimizer_step. *out_stepped says which. Collective. Since 0.1.
 *
 * # Safety
 * `out_stepped` is NULL or writable.
 */
fsdp_status_t fsdp_grad_scaler_step(fsdp_grad_scaler_t *scaler,
                                    fsdp_optimizer_t *optimizer,
                                    int32_t *out_stepped);

/**
 * Ends an iteration: the scale grows or backs off as said at fsdp_grad_scaler_config_t. FSDP_ERR_INVALID_STATE if
 * nothing was unscaled since the last update. Local. Since 0.1.
 */
fsdp_status_t fsdp_grad_scaler_update(fsdp_grad_scaler_t *scaler);

/**
 * Writes options and state, for a checkpoint. Set out->struct_size before the call. Local. Since 0.1.
 *
 * # Safety
 * `out` is NULL or points to `struct_size` writable bytes.
 */
fsdp_status_t fsdp_grad_scaler_get_state(const fsdp_grad_scaler_t *scaler,
                                         fsdp_grad_scaler_config_t *out);

/**
 * Takes options and state, the same on every rank. FSDP_ERR_INVALID_ARGUMENT if `enabled` is not the scaler's;
 * FSDP_ERR_INVALID_STATE between unscaling and update. Local. Since 0.1.
 *
 * # Safety
 * `config` is NULL or points to `struct_size` readable bytes.
 */
fsdp_status_t fsdp_grad_scaler_set_state(fsdp_grad_scaler_t *scaler,
                                         const fsdp_grad_scaler_config_t *config);

/**
 * The full parameter in the dtype that it is computed in, to be read until its unit is resharded: a view of the unit
 * buffer, or of the unit's copy in 16 bits, at the same address every time. FSDP_ERR_INVALID_STATE while the unit is
 * sharded. On a GPU always a view of the unit buffer, at fsdp_param_info_t.compute_offset, wherever that is since the last
 * unshard. Local. Since 0.1.
 *
 * # Safety
 * `out` is NULL or writable.
 */
fsdp_status_t fsdp_engine_param_data(const fsdp_engine_t *engine,
                                     uint32_t param,
                                     fsdp_tensor_t *out);

/**
 * The memory that collects a parameter's full gradient in this backward, in the parameter's shape: float32, whatever the
 * parameter is computed in, unless the engine has grads_in_param_dtype: then out->dtype says what. *out_accumulate 0:
 * overwrite all of it (its contents are undefined); 1: add to it, in float32 (what was written in 16 bits has been widened,
 * to another address; other parameters' regions stay). The parameter counts as having a gradient from here
 * on. Writable until its unit is reduced. Local, but may wait for an earlier reduction. Errors: FSDP_ERR_INVALID_STATE
 * if the parameter is frozen or nothing was unsharded since the last iteration ended. On a GPU: device memory, to be written
 * on the compute stream; does not wait; another address in each backward, the same until the unit is reduced. Parameters that
 * get no gradient need nothing: the engine zeroes their place. Since 0.1.
 *
 * # Safety
 * `out` and `out_accumulate` are NULL or writable.
 */
fsdp_status_t fsdp_engine_param_grad(fsdp_engine_t *engine,
                                     uint32_t param,
                                     fsdp_tensor_t *out,
                                     int32_t *out_accumulate);

/**
 * The same memory, for an operator that is about to compute a parameter's gradient: what it writes there does not count
 * until fsdp_engine_param_grad is called for the parameter, and is nothing if that is never called. Otherwise as
 * fsdp_engine_param_grad. Since 0.1.
 *
 * # Safety
 * `out` and `out_accumulate` are NULL or writable.
 */
fsdp_status_t fsdp_engine_reserve_grad(fsdp_engine_t *engine,
                                       uint32_t param,
                                       fsdp_tensor_t *out,
                                       int32_t *out_accumulate);

/**
 * Adds a full gradient (contiguous, of the parameter's shape; float32 or what the parameter is computed in; borrowed for
 * the call) in float32 to what this backward has collected for the parameter. On a GPU it lies there, and what is launched on
 * the compute stream reads it: several are quicker together (fsdp_engine_accumulate_grads). Otherwise as
 * fsdp_engine_param_grad. Since 0.1.
 *
 * # Safety
 * `grad` is NULL or describes readable memory.
 */
fsdp_status_t fsdp_engine_accumulate_grad(fsdp_engine_t *engine,
                                          uint32_t param,
                                          const fsdp_tensor_t *grad);

/**
 * fsdp_engine_accumulate_grad of `count` parameters, each of them once: grads[i] is the gradient of params[i]. All arguments
 * are looked at before anything changes: with an error that names a parameter no gradient was taken. On a GPU they are taken
 * by one launch for each dtype, however many they are. Since 0.1.
 *
 * # Safety
 * `params` and `grads` point to `count` readable elements (NULL if it is 0), as of fsdp_engine_accumulate_grad.
 */
fsdp_status_t fsdp_engine_accumulate_grads(fsdp_engine_t *engine,
                                           const uint32_t *params,
                                           const fsdp_tensor_t *grads,
                                           size_t count);

/**
 * This rank's piece of a parameter and of its gradient, whose address holds until the gradient is cleared (or longer:
 * fsdp_heap_retain). Local. Since 0.1.
 *
 * # Safety
 * `out` is NULL or writable.
 */
fsdp_status_t fsdp_engine_shard(const fsdp_engine_t *engine,
                                uint32_t param,
                                fsdp_shard_t *out);

/**
 * Forgets a parameter's gradient: the next reduction overwrites it. Local. Since 0.1.
 */
fsdp_status_t fsdp_engine_clear_grad(fsdp_engine_t *engine, uint32_t param);

/**
 * Forgets all gradients. Without it the next backward adds to them. Local. Since 0.1.
 */
fsdp_status_t fsdp_engine_zero_grad(fsdp_engine_t *engine);

/**
 * What went wrong in this thread's latest call that returns a status: a sentence that names the parameter, unit, rank
 * or file. "" if that call succeeded. Local; the pointer is valid until the thread's next call that returns a status.
 */
const char *fsdp_last_error_message(void);

/**
 * A short name of a status code, e.g. "peer died"; "unknown status" for other numbers. Static, never NULL.
 */
const char *fsdp_status_name(fsdp_status_t status);

/**
 * The library's version, "major.minor.patch". Static, never NULL.
 */
const char *fsdp_version(void);

/**
 * Makes an empty trace of one forward of `model` as it is now; the model is not needed afterwards. No data is
 * involved: announce what a forward does with fsdp_trace_enter, fsdp_trace_use and fsdp_trace_leave, the root (module
 * 0) first. *out is owned by the caller: fsdp_trace_destroy. Local. Since 0.1.
 *
 * # Safety
 * `out` is NULL or writable.
 */
fsdp_status_t fsdp_trace_create(const fsdp_model_t *model,
                                fsdp_trace_t **out);

/**
 * The forward of `module` begins, inside that of the module entered last; containers and modules without parameters
 * are announced too. What an earlier call of the module had used is forgotten. FSDP_ERR_INVALID_STATE unless the root
 * is entered first, and once. Local. Since 0.1.
 */
fsdp_status_t fsdp_trace_enter(fsdp_trace_t *trace,
                               uint32_t module);

/**
 * One operation of the module entered last reads these `count` parameters (borrowed for the call; NULL if there are
 * none, and then nothing happens). FSDP_ERR_INVALID_STATE outside the root's forward. Local. Since 0.1.
 *
 * # Safety
 * `params` is NULL or points to `count` numbers.
 */
fsdp_status_t fsdp_trace_use(fsdp_trace_t *trace,
                             const uint32_t *params,
                             uint32_t count);

/**
 * The forward of `module` ends. FSDP_ERR_INVALID_STATE unless it is the module entered last. Local. Since 0.1.
 */
fsdp_status_t fsdp_trace_leave(fsdp_trace_t *trace,
                               uint32_t module);

/**
 * The modules in the order they were entered, each as often as it was. *out_modules is borrowed until the next call on
 * the trace or its destruction; NULL if there are none. Local. Since 0.1.
 *
 * # Safety
 * `out_modules` and `out_count` are NULL or writable.
 */
fsdp_status_t fsdp_trace_module_order(const fsdp_trace_t *trace,
                                      const uint32_t **out_modules,
                                      uint32_t *out_count);

/**
 * The parameters in the order of their first use. *out_params is borrowed until the next call on the trace or its
 * destruction; NULL if there are none. Local. Since 0.1.
 *
 * # Safety
 * `out_params` and `out_count` are NULL or writable.
 */
fsdp_status_t fsdp_trace_param_order(const fsdp_trace_t *trace,
                                     const uint32_t **out_params,
                                     uint32_t *out_count);

/**
 * *out is 1 if an operation used the parameter, else 0. Local. Since 0.1.
 *
 * # Safety
 * `out` is NULL or writable.
 */
fsdp_status_t fsdp_trace_visited(const fsdp_trace_t *trace, uint32_t param, int32_t *out);

/**
 * How many usages were recorded in the module's own forward, in its latest call: one for each operation that read
 * parameters, and one for each module it called that has parameters in or below it. 0 for a module that was never
 * entered. Local. Since 0.1.
 *
 * # Safety
 * `out` is NULL or writable.
 */
fsdp_status_t fsdp_trace_usage_count(const fsdp_trace_t *trace,
                                     uint32_t module,
                                     uint32_t *out);

/**
 * Usage number `index` of the module, in order. *out_module: the module called, with all parameters in and below it,
 * or `module` itself, with those that its operation read. *out_params is borrowed until the next call on the trace or
 * its destruction. Local. Since 0.1.
 *
 * # Safety
 * The out-pointers are NULL or writable.
 */
fsdp_status_t fsdp_trace_usage(const fsdp_trace_t *trace,
                               uint32_t module,
                               uint32_t index,
                               uint32_t *out_module,
                               const uint32_t **out_params,
                               uint32_t *out_count);

/**
 * Frees the trace; NULL does nothing. Local. Since 0.1.
 */
void fsdp_trace_destroy(fsdp_trace_t *trace);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* FSDP_H */
