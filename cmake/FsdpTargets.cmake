# The C++ layers on fsdp::fsdp, as targets of the build tree: fsdp::cpp (header-only, hosts without LibTorch) and,
# where LibTorch was found, fsdp::torch. fsdpTargets.cmake.in is their installed form: keep the two in step.

set(FSDP_CXX_STANDARD cxx_std_17)

add_library(fsdp_cpp INTERFACE)
add_library(fsdp::cpp ALIAS fsdp_cpp)
target_include_directories(fsdp_cpp INTERFACE "${PROJECT_SOURCE_DIR}/bindings/cpp/include")
target_compile_features(fsdp_cpp INTERFACE ${FSDP_CXX_STANDARD})
target_link_libraries(fsdp_cpp INTERFACE fsdp::fsdp)

if(LibTorch_FOUND)
  add_library(fsdp_torch INTERFACE)
  add_library(fsdp::torch ALIAS fsdp_torch)
  target_include_directories(fsdp_torch INTERFACE "${PROJECT_SOURCE_DIR}/bindings/libtorch/include")
  target_link_libraries(fsdp_torch INTERFACE fsdp::cpp LibTorch::LibTorch)
endif()
