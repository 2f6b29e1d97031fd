# fsdp::mpi, bindings/mpi compiled with the MPI that is found, and how tests run under its mpirun.
#
# MPI is what find_package(MPI) finds, or Debian's Open MPI as scripts/setup.sh has unpacked it (FSDP_THIRD_PARTY_ROOT).
#   FSDP_WITH_MPI   AUTO (where it is found), ON, OFF
# Result: FSDP_MPI_MISSING (why there is none, or ""), FSDP_MPIRUN, FSDP_MPI_ENVIRONMENT, and the target fsdp::mpi.
#
#   fsdp_add_mpi_test(NAME feature_x_mpi_w2 RANKS 2 SOURCES x.c | TARGET y | COMMAND z... [ARGS ...] [TIMEOUT 60] [ENVIRONMENT ...])
#     As fsdp_add_test, labelled mpi; skipped, with the reason, where there is no MPI. C sources get FSDP_TEST_MPI.

set(FSDP_WITH_MPI AUTO CACHE STRING "Build bindings/mpi and what needs it: ON, OFF, or AUTO (when MPI is found)")
set_property(CACHE FSDP_WITH_MPI PROPERTY STRINGS AUTO ON OFF)

set(FSDP_MPI_MISSING "")
set(FSDP_MPI_ENVIRONMENT "")
if(FSDP_WITH_MPI STREQUAL "OFF")
  set(FSDP_MPI_MISSING "FSDP_WITH_MPI is OFF")
else()
  # An mpicc without mpi.h (Debian's openmpi-bin alone) would be an error of find_package, not a "not found".
  if(MPI_C_COMPILER)
    set(_fsdp_mpicc "${MPI_C_COMPILER}")
  else()
    unset(_fsdp_mpicc)
    find_program(_fsdp_mpicc NAMES mpicc NO_CACHE)
  endif()
  if(_fsdp_mpicc)
    file(WRITE "${PROJECT_BINARY_DIR}/mpi_h.c" "#include <mpi.h>\n")
    execute_process(COMMAND "${_fsdp_mpicc}" -E "${PROJECT_BINARY_DIR}/mpi_h.c"
      RESULT_VARIABLE _fsdp_mpicc_fails OUTPUT_QUIET ERROR_QUIET)
  else()
    set(_fsdp_mpicc_fails 0)
  endif()
  if(_fsdp_mpicc_fails EQUAL 0)
    find_package(MPI QUIET COMPONENTS C)
  endif()
  if(NOT TARGET MPI::MPI_C)
    set(_root "${FSDP_THIRD_PARTY_ROOT}")
    file(GLOB _headers "${_root}/usr/lib/*/openmpi/include/mpi.h" "/usr/lib/*/openmpi/include/mpi.h")
    file(GLOB _libraries "${_root}/usr/lib/*/libmpi.so.40" "/usr/lib/*/libmpi.so.40")
    if(_headers AND _libraries)
      list(GET _headers 0 _header)
      list(GET _libraries 0 _library)
      get_filename_component(_include "${_header}" DIRECTORY)
      # For the outside projects of FsdpLinkTests.cmake, which find_package(MPI) would not help either.
      set(FSDP_MPI_UNPACKED "MPI_INCLUDE=${_include}" "MPI_LIBRARY=${_library}")
      add_library(MPI::MPI_C UNKNOWN IMPORTED)
      set_target_properties(MPI::MPI_C PROPERTIES
        IMPORTED_LOCATION "${_library}"
        INTERFACE_INCLUDE_DIRECTORIES "${_include};${_include}/openmpi")
      if(_root AND _library MATCHES "^${_root}/")
        # Unpacked, not installed: it has to be told where it is, and so are the libraries that it needs.
        get_filename_component(_libdir "${_library}" DIRECTORY)
        target_link_options(MPI::MPI_C INTERFACE "LINKER:-rpath-link,${_libdir}")
        set(FSDP_MPI_ENVIRONMENT "OPAL_PREFIX=${_root}/usr" "PMIX_INSTALL_PREFIX=${_libdir}/pmix2"
          "PMIX_MCA_pcompress_base_silence_warning=1" "LD_LIBRARY_PATH=${_libdir}")
      endif()
    endif()
  endif()
  if(FSDP_MPI_ENVIRONMENT)
    find_program(FSDP_MPIRUN NAMES mpirun mpirun.openmpi PATHS "${FSDP_THIRD_PARTY_ROOT}/usr/bin" NO_DEFAULT_PATH)
  endif()
  find_program(FSDP_MPIRUN NAMES mpirun mpirun.openmpi mpiexec HINTS "${FSDP_THIRD_PARTY_ROOT}/usr/bin"
    DOC "Starts MPI programs")
  if(NOT TARGET MPI::MPI_C)
    set(FSDP_MPI_MISSING "no MPI with its headers was found (Debian: libopenmpi-dev and openmpi-bin)")
  elseif(NOT FSDP_MPIRUN)
    set(FSDP_MPI_MISSING "no mpirun was found (Debian: openmpi-bin)")
  endif()
  if(FSDP_MPI_UNPACKED AND NOT FSDP_MPI_MISSING)
    # Its parts find each other only where all are unpacked, or all installed.
    string(FIND "${FSDP_MPIRUN}" "${FSDP_THIRD_PARTY_ROOT}/" _unpacked_mpirun)
    if((_unpacked_mpirun EQUAL 0 AND NOT FSDP_MPI_ENVIRONMENT) OR (NOT _unpacked_mpirun EQUAL 0 AND FSDP_MPI_ENVIRONMENT))
      set(FSDP_MPI_MISSING "Open MPI is installed in parts: libopenmpi3 and openmpi-bin are needed both")
    endif()
  endif()
  if(FSDP_MPI_MISSING AND FSDP_WITH_MPI STREQUAL "ON")
    message(FATAL_ERROR "FSDP_WITH_MPI is ON, but ${FSDP_MPI_MISSING}")
  endif()
endif()

if(FSDP_MPI_MISSING)
  message(STATUS "fsdp: without MPI (${FSDP_MPI_MISSING}): fsdp::mpi is left out")
else()
  add_library(fsdp_mpi STATIC "${PROJECT_SOURCE_DIR}/bindings/mpi/src/fsdp_mpi.c")
  add_library(fsdp::mpi ALIAS fsdp_mpi)
  set_target_properties(fsdp_mpi PROPERTIES C_STANDARD 11 POSITION_INDEPENDENT_CODE ON)
  target_include_directories(fsdp_mpi PUBLIC "${PROJECT_SOURCE_DIR}/bindings/mpi/include")
  target_link_libraries(fsdp_mpi PUBLIC fsdp::fsdp MPI::MPI_C Threads::Threads)
endif()

# Containers run as root, have fewer cores than ranks, and may not read each other's memory.
list(APPEND FSDP_MPI_ENVIRONMENT "OMPI_ALLOW_RUN_AS_ROOT=1" "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
  "OMPI_MCA_rmaps_base_oversubscribe=1" "OMPI_MCA_mpi_yield_when_idle=1" "OMPI_MCA_btl_vader_single_copy_mechanism=none"
  "OMPI_MCA_btl_base_warn_component_unused=0")

function(fsdp_add_mpi_test)
  cmake_parse_arguments(PARSE_ARGV 0 M "TORCH" "NAME;TARGET;RANKS;TIMEOUT" "SOURCES;ARGS;COMMAND;ENVIRONMENT")
  if(FSDP_MPI_MISSING)
    fsdp_add_test(NAME ${M_NAME} LABELS mpi COMMAND "${CMAKE_COMMAND}" -E echo "skipped: ${FSDP_MPI_MISSING}")
    set_tests_properties(${M_NAME} PROPERTIES SKIP_REGULAR_EXPRESSION "^skipped: ")
    return()
  endif()
  if(NOT M_TIMEOUT)
    set(M_TIMEOUT 60)
  endif()
  if(M_SOURCES)
    set(M_TARGET ${M_NAME})
    add_executable(${M_TARGET} ${M_SOURCES})
    set_target_properties(${M_TARGET} PROPERTIES C_STANDARD 11)
    target_compile_definitions(${M_TARGET} PRIVATE FSDP_TEST_MPI)
    target_link_libraries(${M_TARGET} PRIVATE fsdp::mpi fsdp_build_flags m)
  endif()
  if(M_COMMAND)
    set(_command ${M_COMMAND})
  else()
    set(_command "${FSDP_MPIRUN}" -n ${M_RANKS} "$<TARGET_FILE:${M_TARGET}>" ${M_ARGS})
  endif()
  fsdp_add_test(NAME ${M_NAME} TIMEOUT ${M_TIMEOUT} LABELS mpi ENVIRONMENT ${FSDP_MPI_ENVIRONMENT} ${M_ENVIRONMENT}
    COMMAND ${_command})
  set_tests_properties(${M_NAME} PROPERTIES PROCESSORS 2)
endfunction()
