/* fsdp_comm_init_env: which launcher's variables it reads, and what it says about missing or
 * malformed ones. World size 1 throughout: nothing here waits for another process. */
#include "test.h"

static const char *const ALL_VARIABLES[] = {"RANK",
                                            "WORLD_SIZE",
                                            "LOCAL_RANK",
                                            "LOCAL_WORLD_SIZE",
                                            "MASTER_ADDR",
                                            "MASTER_PORT",
                                            "GROUP_RANK",
                                            "FSDP_JOB",
                                            "FSDP_TIMEOUT_MS",
                                            "FSDP_RENDEZVOUS_TIMEOUT_MS",
                                            "SLURM_PROCID",
                                            "SLURM_NTASKS",
                                            "SLURM_LOCALID",
                                            "SLURM_NNODES",
                                            "SLURM_JOB_ID",
                                            "SLURM_STEP_ID",
                                            "PMI_RANK",
                                            "PMI_SIZE",
                                            "OMPI_COMM_WORLD_RANK",
                                            "OMPI_COMM_WORLD_SIZE",
                                            "PMIX_NAMESPACE",
                                            "PMIX_RANK",
                                            "OMPI_MCA_orte_hnp_uri",
                                            "TORCHELASTIC_RUN_ID",
                                            "OMPI_COMM_WORLD_LOCAL_RANK",
                                            "OMPI_COMM_WORLD_LOCAL_SIZE"};

static void forget_everything(void) {
  for (size_t i = 0; i < sizeof ALL_VARIABLES / sizeof ALL_VARIABLES[0]; i++)
    unsetenv(ALL_VARIABLES[i]);
}

static void set(const char *name, const char *value) { CHECK_EQ(setenv(name, value, 1), 0); }

/* torchrun's variables for a job of one rank. The job's name must differ from other jobs' that run
 * meanwhile. */
static void torchrun_of_one(const char *port) {
  forget_everything();
  set("RANK", "0");
  set("WORLD_SIZE", "1");
  set("LOCAL_RANK", "0");
  set("LOCAL_WORLD_SIZE", "1");
  set("MASTER_ADDR", "127.0.0.1");
  set("MASTER_PORT", port);
}

static void joins_as_rank_0_of_1(void) {
  fsdp_comm_t *comm = NULL;
  int32_t rank = -7, world = -7;
  CHECK_OK(fsdp_comm_init_env(&comm));
  CHECK_OK(fsdp_comm_rank(comm, &rank));
  CHECK_OK(fsdp_comm_world_size(comm, &world));
  CHECK_EQ(rank, 0);
  CHECK_EQ(world, 1);
  CHECK_OK(fsdp_comm_barrier(comm));
  fsdp_comm_destroy(comm);
}

static void refuses(const char *text) {
  fsdp_comm_t *comm = NO_SUCH_HANDLE(fsdp_comm_t);
  CHECK_ERR(fsdp_comm_init_env(&comm), FSDP_ERR_INVALID_ARGUMENT, text);
  CHECK(comm == NO_SUCH_HANDLE(fsdp_comm_t));
}

int main(void) {
  char port[16];
  snprintf(port, sizeof port, "%d", 20000 + (int)((size_t)&port / 4096 % 10000));
  forget_everything();
  CHECK_ERR(fsdp_comm_init_env(NULL), FSDP_ERR_INVALID_ARGUMENT, "out is NULL");
  joins_as_rank_0_of_1();

  torchrun_of_one(port);
  joins_as_rank_0_of_1();
  torchrun_of_one(port);
  unsetenv("WORLD_SIZE");
  refuses("WORLD_SIZE");
  torchrun_of_one(port);
  unsetenv("RANK");
  refuses("RANK");
  const char *const malformed[] = {"", "x", "1x", " ", "-1", "99999999999999999999", "1.0"};
  for (size_t i = 0; i < sizeof malformed / sizeof malformed[0]; i++) {
    torchrun_of_one(port);
    set("RANK", malformed[i]);
    refuses("RANK");
    torchrun_of_one(port);
    set("WORLD_SIZE", malformed[i]);
    refuses("WORLD_SIZE");
    torchrun_of_one(port);
    set("FSDP_TIMEOUT_MS", malformed[i]);
    refuses("FSDP_TIMEOUT_MS");
    torchrun_of_one(port);
    set("FSDP_RENDEZVOUS_TIMEOUT_MS", malformed[i]);
    refuses("FSDP_RENDEZVOUS_TIMEOUT_MS");
  }
  torchrun_of_one(port);
  set("RANK", "1");
  refuses("RANK");
  torchrun_of_one(port);
  set("WORLD_SIZE", "0");
  refuses("WORLD_SIZE");
  torchrun_of_one(port);
  set("FSDP_TIMEOUT_MS", "5000");
  set("FSDP_RENDEZVOUS_TIMEOUT_MS", "5000");
  joins_as_rank_0_of_1();

  forget_everything();
  set("OMPI_COMM_WORLD_RANK", "0");
  set("OMPI_COMM_WORLD_SIZE", "1");
  set("OMPI_COMM_WORLD_LOCAL_RANK", "0");
  set("OMPI_COMM_WORLD_LOCAL_SIZE", "1");
  set("FSDP_JOB", port);
  joins_as_rank_0_of_1();
  unsetenv("OMPI_COMM_WORLD_SIZE");
  refuses("OMPI_COMM_WORLD_SIZE");

  forget_everything();
  set("SLURM_PROCID", "0");
  set("SLURM_NTASKS", "1");
  set("SLURM_LOCALID", "0");
  set("FSDP_JOB", port);
  joins_as_rank_0_of_1();

  forget_everything();
  set("PMI_RANK", "0");
  set("PMI_SIZE", "1");
  set("FSDP_JOB", port);
  joins_as_rank_0_of_1();
  return 0;
}
