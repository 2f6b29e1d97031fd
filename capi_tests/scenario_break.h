/* The switch that breaks a property on purpose, in test hosts only: with FSDP_TEST_BREAK=NAME in
 * the environment a program does one thing wrong where it asks broken("NAME"), so that
 * scenario_red.py can show that its checks notice. For C and C++. */
#ifndef FSDP_TEST_SCENARIO_BREAK_H
#define FSDP_TEST_SCENARIO_BREAK_H

#include <stdlib.h>
#include <string.h>

static inline int broken(const char *name) {
  const char *wanted = getenv("FSDP_TEST_BREAK");
  return wanted != NULL && strcmp(wanted, name) == 0;
}

#endif
