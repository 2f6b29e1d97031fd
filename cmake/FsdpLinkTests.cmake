# link_ tests: the ABI's fixed numbers, and outside projects built against an installed tree (see outside/run.sh).

set(_abi "${PROJECT_SOURCE_DIR}/capi_tests/link_abi.c")
set(_abi_cpp "${PROJECT_BINARY_DIR}/link_abi_cpp.cpp")
file(CONFIGURE OUTPUT "${_abi_cpp}" CONTENT "#include \"${_abi}\"\n" @ONLY)
fsdp_add_test(NAME link_abi_c SOURCES "${_abi}")
fsdp_add_test(NAME link_abi_cpp SOURCES "${_abi_cpp}")
set_target_properties(link_abi_cpp PROPERTIES CXX_STANDARD 17)
if(LibTorch_FOUND)
  target_include_directories(link_abi_cpp SYSTEM PRIVATE "${LibTorch_ROOT_DIR}/include")
  target_compile_definitions(link_abi_cpp PRIVATE FSDP_TEST_DLPACK)
endif()
fsdp_add_test(NAME link_abi_static SOURCES "${_abi}" STATIC)

set(_outside "${PROJECT_BINARY_DIR}/outside")
fsdp_add_test(NAME link_install TIMEOUT 120
  COMMAND "${CMAKE_COMMAND}" --install "${PROJECT_BINARY_DIR}" --prefix "${_outside}/prefix")
set_tests_properties(link_install PROPERTIES FIXTURES_SETUP fsdp_prefix COST 100)

set(_kinds cmake_c cmake_static cmake_cpp cmake_relocated pkgconfig_shared pkgconfig_static)
if(TARGET fsdp::torch)
  list(APPEND _kinds cmake_torch)
else()
  list(APPEND _kinds cmake_no_torch)
endif()
if(TARGET fsdp::mpi)
  list(APPEND _kinds cmake_mpi)
endif()
find_program(FSDP_PKG_CONFIG NAMES pkg-config pkgconf)
foreach(_kind IN LISTS _kinds)
  fsdp_add_test(NAME link_${_kind} TIMEOUT 300
    COMMAND bash "${PROJECT_SOURCE_DIR}/cmake/outside/run.sh" ${_kind} "${_outside}/prefix" "${_outside}/${_kind}"
    ENVIRONMENT "CMAKE=${CMAKE_COMMAND}" "CC=${CMAKE_C_COMPILER}" "CXX=${CMAKE_CXX_COMPILER}"
      "GENERATOR=${CMAKE_GENERATOR}" "MAKE_PROGRAM=${CMAKE_MAKE_PROGRAM}" "PKG_CONFIG=${FSDP_PKG_CONFIG}"
      "MPIRUN=${FSDP_MPIRUN}" ${FSDP_MPI_ENVIRONMENT} ${FSDP_MPI_UNPACKED}
      "TORCH=${LibTorch_ROOT_DIR}" "LIBDIR=${CMAKE_INSTALL_LIBDIR}" "VERSION=${PROJECT_VERSION}")
  # The two ranks at the end are no work: one processor, that of the compiler.
  set_tests_properties(link_${_kind} PROPERTIES FIXTURES_REQUIRED fsdp_prefix)
endforeach()
if(TARGET fsdp::torch)
  # The longest, on one processor: first, with those that mostly wait beside it (capi_tests).
  set_tests_properties(link_cmake_torch PROPERTIES COST 90)
endif()
