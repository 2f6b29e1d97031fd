/* Trains a sharded multilayer perceptron in plain C: one process a rank, no framework.
 *
 *   fsdp run -n 4 -- c_mlp --steps 500
 *   torchrun --no-python --nproc-per-node 4 c_mlp
 *   mpirun -n 4 c_mlp
 *
 *   mpirun -n 4 c_mlp --comm mpi     (ranks on several hosts, too; where it was built with MPI)
 *
 * or any other launcher that fsdp_comm_init_env knows; without one it runs as a single rank. The
 * task is to learn a wavy function of two variables from random samples. A step is: forward, loss,
 * backward (mlp.c), then the library's optimizer, which updates this rank's shards. Losses are the
 * same for every number of ranks, up to rounding, because the ranks split one global batch.
 */
#include <errno.h>
#include <fsdp.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef C_MLP_WITH_MPI
#include <fsdp_mpi.h>
#endif

#include "mlp.h"

#define TRY(call) \
  do { \
    fsdp_status_t status_ = (call); \
    if (status_ != FSDP_OK) return status_; \
  } while (0)

typedef struct {
  int steps, batch, hidden, layers, adam, log_every, mpi;
  unsigned seed;
  double lr;
} options_t;

static const char HELP[] =
    "usage: c_mlp [options]\n"
    "Trains a sharded multilayer perceptron; start it on several ranks with `fsdp run -n N -- "
    "c_mlp`.\n"
    "\n"
    "  --steps N       optimizer steps (default 300)\n"
    "  --batch N       samples of a step over all ranks; a multiple of the number of ranks "
    "(default 64)\n"
    "  --hidden N      width of the hidden layers (default 64)\n"
    "  --layers N      layers, at least 2 (default 4)\n"
    "  --lr X          learning rate (default 0.01 with adam, 0.1 with sgd)\n"
    "  --optimizer S   adam (default) or sgd\n"
    "  --seed N        of the starting values and the samples (default 1)\n"
    "  --log-every N   steps between two printed losses (default 20)\n"
    "  --comm S        env (default: shared memory, ranks of the launcher) or mpi\n"
    "  --help          print this\n";

/* ---- the optimizer: the library's, on this rank's shards; its state is sharded like them ---- */

static fsdp_status_t create_optimizer(const options_t *options, fsdp_engine_t *engine,
                                      fsdp_optimizer_t **optimizer) {
  if (options->adam) {
    fsdp_adamw_config_t config = FSDP_ADAMW_CONFIG_INIT;
    config.lr = options->lr;
    config.weight_decay = 0;
    return fsdp_optimizer_create_adamw(engine, &config, optimizer);
  }
  fsdp_sgd_config_t config = FSDP_SGD_CONFIG_INIT;
  config.lr = options->lr;
  return fsdp_optimizer_create_sgd(engine, &config, optimizer);
}

/* ---- the task ---- */

/* Sample `index` of step `step`: any rank can make any sample. */
static void make_sample(const options_t *options, int step, int index, float *x, float *y) {
  unsigned state =
      options->seed * 2654435761u + (unsigned)step * 40503u + (unsigned)index * 2246822519u;
  for (int i = 0; i < 2; i++) {
    state = (state ^ (state >> 15)) * 2246822519u;
    state = (state ^ (state >> 13)) * 3266489917u;
    state ^= state >> 16;
    x[i] = (float)(state >> 8) / 8388608.0f - 1.0f;
  }
  *y = sinf(3 * x[0]) * cosf(2 * x[1]) + 0.5f * x[0] * x[1];
}

/* ---- training ---- */

typedef struct {
  fsdp_comm_t *comm;
  int32_t rank, world;
  mlp_t mlp;
  fsdp_optimizer_t *optimizer;
  float *x, *y, *gradient;
} trainer_t;

/* One step over this rank's part of the global batch; *loss is the mean over the whole batch. */
static fsdp_status_t train_step(const options_t *options, trainer_t *t, int step, float *loss) {
  const int batch = options->batch / t->world;
  const float *output;
  int64_t one = 1;
  for (int s = 0; s < batch; s++)
    make_sample(options, step, t->rank * batch + s, t->x + 2 * s, t->y + s);
  TRY(mlp_forward(&t->mlp, t->x, batch, &output));
  *loss = 0;
  for (int s = 0; s < batch; s++) {
    const float error = output[s] - t->y[s];
    *loss += error * error / (float)batch;
    /* The mean over this rank's samples; the library then takes the mean over the ranks. */
    t->gradient[s] = 2 * error / (float)batch;
  }
  TRY(mlp_backward(&t->mlp, t->gradient, batch));
  TRY(fsdp_optimizer_step(t->optimizer));
  TRY(fsdp_engine_zero_grad(t->mlp.engine));

  fsdp_tensor_t mean;
  memset(&mean, 0, sizeof mean);
  mean.data = loss;
  mean.device.device_type = FSDP_DEVICE_CPU;
  mean.ndim = 1;
  mean.dtype.code = FSDP_DTYPE_FLOAT;
  mean.dtype.bits = 32;
  mean.dtype.lanes = 1;
  mean.shape = &one;
  return fsdp_comm_all_reduce(t->comm, &mean, FSDP_REDUCE_AVG);
}

static fsdp_status_t train(const options_t *options, trainer_t *t) {
  float loss = 0;
  for (int step = 1; step <= options->steps; step++) {
    TRY(train_step(options, t, step, &loss));
    if (t->rank == 0 && (step == 1 || step % options->log_every == 0 || step == options->steps)) {
      printf("step %4d  loss %.6f\n", step, (double)loss);
      fflush(stdout);
    }
  }
  return FSDP_OK;
}

static fsdp_status_t print_memory(const options_t *options, const trainer_t *t) {
  fsdp_stats_t stats;
  stats.struct_size = sizeof stats;
  TRY(fsdp_engine_stats(t->mlp.engine, &stats));
  if (t->rank == 0) {
    printf("%d rank%s, each with %llu of %llu bytes of parameters; all-gathers %s %llu bytes\n",
           (int)t->world, t->world == 1 ? "" : "s", (unsigned long long)stats.param_shard_bytes,
           (unsigned long long)(stats.param_shard_bytes * (uint64_t)t->world),
           options->mpi ? "sent" : "copied",
           (unsigned long long)(options->mpi ? stats.all_gather_sent_bytes
                                             : stats.all_gather_bytes_moved));
  }
  return FSDP_OK;
}

/* Ranks that mpirun started, on MPI's collectives. */
static fsdp_status_t init_mpi(fsdp_comm_t **comm) {
#ifdef C_MLP_WITH_MPI
  if (MPI_Init(NULL, NULL) != MPI_SUCCESS) exit(1); /* MPI has said why */
  return fsdp_comm_init_mpi(MPI_COMM_WORLD, NULL, comm);
#else
  *comm = NULL; /* `parse` has refused it */
  return FSDP_ERR_UNSUPPORTED;
#endif
}

/* Joins the job, makes the model, trains. On an error the caller cleans up. */
static fsdp_status_t run(const options_t *options, trainer_t *t) {
  int sizes[MLP_MAX_LAYERS + 1];
  TRY(options->mpi ? init_mpi(&t->comm) : fsdp_comm_init_env(&t->comm));
  TRY(fsdp_comm_rank(t->comm, &t->rank));
  TRY(fsdp_comm_world_size(t->comm, &t->world));
  if (options->batch % t->world != 0) {
    fprintf(stderr, "c_mlp: --batch %d is not a multiple of the %d ranks\n", options->batch,
            (int)t->world);
    exit(2);
  }
  const size_t batch = (size_t)(options->batch / t->world);
  for (int l = 0; l <= options->layers; l++)
    sizes[l] = l == 0 ? 2 : l == options->layers ? 1 : options->hidden;
  TRY(mlp_create(&t->mlp, t->comm, sizes, options->layers, (int)batch, options->seed));
  TRY(create_optimizer(options, t->mlp.engine, &t->optimizer));
  t->x = (float *)calloc(batch * 2, sizeof(float));
  t->y = (float *)calloc(batch, sizeof(float));
  t->gradient = (float *)calloc(batch, sizeof(float));
  if (t->x == NULL || t->y == NULL || t->gradient == NULL) {
    fprintf(stderr, "c_mlp: no memory\n");
    exit(1);
  }
  TRY(print_memory(options, t));
  TRY(train(options, t));
  return print_memory(options, t);
}

static void clean_up(trainer_t *t) {
  fsdp_optimizer_destroy(t->optimizer);
  free(t->x);
  free(t->y);
  free(t->gradient);
  mlp_destroy(&t->mlp);
  fsdp_comm_destroy(t->comm);
}

/* ---- the command line ---- */

static void refuse(const char *option, const char *value, const char *wanted) {
  fprintf(stderr, "c_mlp: %s %s: %s (see --help)\n", option, value, wanted);
  exit(2);
}

static int parse_int(const char *option, const char *value, int least, int most) {
  char *end, wanted[64];
  errno = 0;
  const long number = strtol(value, &end, 10);
  if (end == value || *end != '\0' || errno != 0 || number < least || number > most) {
    snprintf(wanted, sizeof wanted, "a whole number from %d to %d is needed", least, most);
    refuse(option, value, wanted);
  }
  return (int)number;
}

static options_t parse(int argc, char **argv) {
  options_t o;
  memset(&o, 0, sizeof o);
  o.steps = 300;
  o.batch = 64;
  o.hidden = 64;
  o.layers = 4;
  o.adam = 1;
  o.log_every = 20;
  o.seed = 1;
  for (int i = 1; i < argc; i++) {
    const char *option = argv[i];
    if (strcmp(option, "--help") == 0) {
      fputs(HELP, stdout);
      exit(0);
    }
    if (strncmp(option, "--", 2) != 0) refuse("argument", option, "only options are known");
    if (i + 1 == argc) refuse("option", option, "it is unknown, or its value is missing");
    const char *value = argv[++i];
    if (strcmp(option, "--steps") == 0) {
      o.steps = parse_int(option, value, 1, 100000000);
    } else if (strcmp(option, "--batch") == 0) {
      o.batch = parse_int(option, value, 1, 1 << 20);
    } else if (strcmp(option, "--hidden") == 0) {
      o.hidden = parse_int(option, value, 1, 8192);
    } else if (strcmp(option, "--layers") == 0) {
      o.layers = parse_int(option, value, 2, MLP_MAX_LAYERS);
    } else if (strcmp(option, "--seed") == 0) {
      o.seed = (unsigned)parse_int(option, value, 0, 1 << 30);
    } else if (strcmp(option, "--log-every") == 0) {
      o.log_every = parse_int(option, value, 1, 100000000);
    } else if (strcmp(option, "--optimizer") == 0) {
      if (strcmp(value, "adam") != 0 && strcmp(value, "sgd") != 0)
        refuse(option, value, "adam or sgd is needed");
      o.adam = strcmp(value, "adam") == 0;
    } else if (strcmp(option, "--comm") == 0) {
      if (strcmp(value, "env") != 0 && strcmp(value, "mpi") != 0)
        refuse(option, value, "env or mpi is needed");
      o.mpi = strcmp(value, "mpi") == 0;
#ifndef C_MLP_WITH_MPI
      if (o.mpi) refuse(option, value, "this program was built without MPI");
#endif
    } else if (strcmp(option, "--lr") == 0) {
      char *end;
      o.lr = strtod(value, &end);
      if (end == value || *end != '\0' || !(o.lr > 0) || o.lr > 1e6)
        refuse(option, value, "a positive number is needed");
    } else {
      refuse("option", option, "it is unknown");
    }
  }
  if (o.lr == 0) o.lr = o.adam ? 0.01 : 0.1;
  return o;
}

int main(int argc, char **argv) {
  const options_t options = parse(argc, argv);
  trainer_t trainer;
  memset(&trainer, 0, sizeof trainer);
  const fsdp_status_t status = run(&options, &trainer);
  if (status != FSDP_OK) {
    /* The message says what was wrong and with which rank, unit or parameter: e.g. that rank 2's
     * process died. */
    fprintf(stderr, "c_mlp: %s: %s\n", fsdp_status_name(status), fsdp_last_error_message());
  }
  clean_up(&trainer);
#ifdef C_MLP_WITH_MPI
  if (options.mpi && status != FSDP_OK) MPI_Abort(MPI_COMM_WORLD, 1);
  if (options.mpi) MPI_Finalize();
#endif
  return status == FSDP_OK ? 0 : 1;
}
