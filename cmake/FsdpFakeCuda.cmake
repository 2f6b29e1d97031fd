# The targets fsdp_fake_cuda, a CUDA driver and run-time compiler that are the CPU (tests/cuda/fake_driver.cpp) with the
# engine's kernels in it, and fsdp_fake_nccl, an NCCL that is one process: for tests of what hosts do on a GPU.
# FSDP_FAKE_CUDA_ENVIRONMENT makes a test use them. The kernels' files and names are those that src/device/cuda lists.
if(NOT TARGET fsdp_fake_cuda)
  set(_cuda "${PROJECT_SOURCE_DIR}/src/device/cuda")
  set(_listed "${_cuda}/compile.rs" "${_cuda}/kernels.rs")
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${_listed})
  file(READ "${_cuda}/compile.rs" _text)
  string(REGEX MATCHALL "kernels/[a-z_0-9]+\\.cu" _files "${_text}")
  file(READ "${_cuda}/kernels.rs" _text)
  string(REGEX MATCHALL "c\"fsdp_[a-z_0-9]+\"" _names "${_text}")
  if(NOT _files OR NOT _names)
    message(FATAL_ERROR "no CUDA kernels were found in ${_cuda}")
  endif()
  list(TRANSFORM _files REPLACE "(.+)" "#include \"${_cuda}/\\1\"\n")
  list(TRANSFORM _names REPLACE "c\"(.+)\"" "X(\\1)")
  string(CONCAT _files ${_files})
  list(JOIN _names " " _names)
  set(_kernels "${PROJECT_BINARY_DIR}/fake_cuda_kernels.cu")
  file(CONFIGURE OUTPUT "${_kernels}" CONTENT "${_files}#define KERNELS(X) ${_names}\n" @ONLY)

  add_library(fsdp_fake_cuda MODULE EXCLUDE_FROM_ALL "${PROJECT_SOURCE_DIR}/tests/cuda/fake_driver.cpp")
  target_compile_features(fsdp_fake_cuda PRIVATE cxx_std_17)
  target_compile_definitions(fsdp_fake_cuda PRIVATE "KERNEL_SOURCES=\"${_kernels}\"")
  # As tests/cuda/fake.rs: no contraction, and what a GPU would not allow ends the process.
  target_compile_options(fsdp_fake_cuda PRIVATE -O1 -ffp-contract=off -fno-strict-aliasing -fsanitize=undefined
    -fsanitize-undefined-trap-on-error)
  add_library(fsdp_fake_nccl MODULE EXCLUDE_FROM_ALL "${PROJECT_SOURCE_DIR}/tests/nccl/fake_nccl.c")
  set_target_properties(fsdp_fake_nccl PROPERTIES C_STANDARD 11)
  target_compile_definitions(fsdp_fake_nccl PRIVATE _POSIX_C_SOURCE=200809L)
  find_package(Threads REQUIRED)
  target_link_libraries(fsdp_fake_nccl PRIVATE Threads::Threads)
endif()
set(FSDP_FAKE_CUDA_ENVIRONMENT "FSDP_CUDA_LIBRARY=$<TARGET_FILE:fsdp_fake_cuda>"
  "FSDP_NVRTC_LIBRARY=$<TARGET_FILE:fsdp_fake_cuda>" "FSDP_NCCL_LIBRARY=$<TARGET_FILE:fsdp_fake_nccl>" XDG_CACHE_HOME=/proc/none)
