# How tests are declared.
#
#   fsdp_add_test(NAME api_comm SOURCES comm.c [TORCH] [STATIC] [RANKS 2] [ARGS ...] [TIMEOUT 60] [LABELS ...]
#                 [ENVIRONMENT A=1 ...])
#     Builds an executable of that name from the sources and runs it: alone, or as RANKS ranks under `fsdp run`.
#     .c is C11 against fsdp::fsdp; C++ links fsdp::cpp; TORCH links fsdp::torch (such a test is left out, with a
#     message, where LibTorch is missing); STATIC links the static library.
#   fsdp_add_test(NAME api_comm_4 TARGET api_comm RANKS 4 ...)
#     Runs an executable that exists already, e.g. with another number of ranks. TORCH is to be said of one of LibTorch.
#   fsdp_add_test(NAME link_x COMMAND program args...)
#     Runs any command.
#   fsdp_add_torch_executable(TARGET source...)
#     An executable as TORCH's above, without a test.
#   fsdp_check_test_names()
#     Fails when any test of the project, however it was added, has no known prefix. Called at the end.
#
# Every test has a time limit (in seconds), and tests of several ranks count for two processors, so that
# `ctest -j2` never runs them beside another one, unless waiting is all that they do.

set(FSDP_TEST_PREFIXES api scenario feature link fault bind train)
option(FSDP_TEST_PCH "Compile LibTorch's headers once for all LibTorch tests" ON)

# The flags of tests and examples; not of the library's interface.
add_library(fsdp_build_flags INTERFACE)
target_compile_options(fsdp_build_flags INTERFACE -Wall -Wextra)
if(FSDP_SANITIZE)
  target_compile_options(fsdp_build_flags INTERFACE "-fsanitize=${FSDP_SANITIZE}" -fno-omit-frame-pointer -g)
  target_link_options(fsdp_build_flags INTERFACE "-fsanitize=${FSDP_SANITIZE}")
endif()

function(_fsdp_check_name name)
  list(JOIN FSDP_TEST_PREFIXES "|" _alternatives)
  if(NOT name MATCHES "^(${_alternatives})_[a-z0-9_]+$")
    message(FATAL_ERROR "test '${name}': a test's name is one of the prefixes ${FSDP_TEST_PREFIXES}, then _ and "
      "lower-case letters, digits and _")
  endif()
endfunction()

# The target whose precompiled torch/torch.h the LibTorch tests share. They are compiled without optimization, which takes
# half the time; what they test is LibTorch and the core, which are not.
function(_fsdp_torch_pch)
  if(FSDP_TEST_PCH AND NOT TARGET fsdp_torch_pch)
    file(WRITE "${PROJECT_BINARY_DIR}/torch_pch.cpp" "// Holds the precompiled header that the LibTorch tests share.\n")
    add_library(fsdp_torch_pch OBJECT "${PROJECT_BINARY_DIR}/torch_pch.cpp")
    target_link_libraries(fsdp_torch_pch PRIVATE fsdp::torch fsdp_build_flags)
    target_compile_options(fsdp_torch_pch PRIVATE -O0)
    target_precompile_headers(fsdp_torch_pch PRIVATE <torch/torch.h>)
  endif()
endfunction()

function(fsdp_add_torch_executable target)
  add_executable(${target} ${ARGN})
  set_target_properties(${target} PROPERTIES C_STANDARD 11)
  target_link_libraries(${target} PRIVATE fsdp_build_flags fsdp::torch)
  target_compile_options(${target} PRIVATE -O0)
  _fsdp_torch_pch()
  if(TARGET fsdp_torch_pch)
    target_precompile_headers(${target} REUSE_FROM fsdp_torch_pch)
  endif()
endfunction()

function(fsdp_add_test)
  cmake_parse_arguments(PARSE_ARGV 0 T "TORCH;STATIC" "NAME;TARGET;RANKS;TIMEOUT"
    "SOURCES;ARGS;LABELS;ENVIRONMENT;COMMAND")
  if(T_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "fsdp_add_test(${T_NAME}): unknown arguments: ${T_UNPARSED_ARGUMENTS}")
  endif()
  _fsdp_check_name("${T_NAME}")
  if(T_TORCH AND NOT TARGET fsdp::torch)
    message(STATUS "test ${T_NAME} is left out: it needs LibTorch")
    return()
  endif()
  if(NOT T_TIMEOUT)
    set(T_TIMEOUT 60)
  endif()

  if(T_SOURCES)
    set(T_TARGET ${T_NAME})
    if(T_TORCH)
      fsdp_add_torch_executable(${T_TARGET} ${T_SOURCES})
    else()
      add_executable(${T_TARGET} ${T_SOURCES})
      set_target_properties(${T_TARGET} PROPERTIES C_STANDARD 11)
      if(T_STATIC)
        target_link_libraries(${T_TARGET} PRIVATE fsdp::fsdp_static)
      elseif(T_SOURCES MATCHES "\\.cpp(;|$)")
        target_link_libraries(${T_TARGET} PRIVATE fsdp::cpp)
      else()
        target_link_libraries(${T_TARGET} PRIVATE fsdp::fsdp)
      endif()
      target_link_libraries(${T_TARGET} PRIVATE fsdp_build_flags)
    endif()
  endif()

  if(T_TARGET)
    set(_command "$<TARGET_FILE:${T_TARGET}>" ${T_ARGS})
  elseif(T_COMMAND)
    set(_command ${T_COMMAND})
  else()
    message(FATAL_ERROR "fsdp_add_test(${T_NAME}): SOURCES, TARGET or COMMAND is needed")
  endif()
  set(_processors 1)
  if(T_RANKS)
    set(_command "${FSDP_TOOL}" run -n ${T_RANKS} -- ${_command})
    if(T_RANKS GREATER 1)
      set(_processors 2)
    endif()
  endif()
  add_test(NAME ${T_NAME} COMMAND ${_command})
  string(REGEX MATCH "^[a-z]+" _prefix "${T_NAME}")
  set(_environment "OMP_NUM_THREADS=1" ${T_ENVIRONMENT})
  if(FSDP_SANITIZE AND T_TORCH)
    # LibTorch keeps memory until the process ends, on purpose.
    list(APPEND _environment "ASAN_OPTIONS=detect_leaks=0")
  endif()
  set_tests_properties(${T_NAME} PROPERTIES
    TIMEOUT ${T_TIMEOUT}
    PROCESSORS ${_processors}
    LABELS "${_prefix};${T_LABELS}"
    ENVIRONMENT "${_environment}")
endfunction()

function(fsdp_check_test_names)
  set(_dirs "${PROJECT_SOURCE_DIR}")
  while(_dirs)
    list(POP_FRONT _dirs _dir)
    get_property(_tests DIRECTORY "${_dir}" PROPERTY TESTS)
    foreach(_test IN LISTS _tests)
      _fsdp_check_name("${_test}")
    endforeach()
    get_property(_below DIRECTORY "${_dir}" PROPERTY SUBDIRECTORIES)
    list(APPEND _dirs ${_below})
  endwhile()
endfunction()
