# What `cmake --install` puts where: library, headers, tool, CMake package, pkg-config file. Everything finds itself
# by relative paths, so the prefix may be chosen at installation and moved later.

include(CMakePackageConfigHelpers)

set(_package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/fsdp")
set(_pc_dir "${CMAKE_INSTALL_LIBDIR}/pkgconfig")

install(PROGRAMS "${FSDP_LIB_DIR}/${FSDP_REAL_NAME}" DESTINATION "${CMAKE_INSTALL_LIBDIR}")
install(FILES "${FSDP_LIB_DIR}/${FSDP_SONAME}" "${FSDP_LIB_DIR}/libfsdp.so" "${FSDP_LIB_DIR}/libfsdp.a"
  DESTINATION "${CMAKE_INSTALL_LIBDIR}")
install(PROGRAMS "${FSDP_TOOL}" DESTINATION "${CMAKE_INSTALL_BINDIR}")

install(FILES "${PROJECT_SOURCE_DIR}/include/fsdp.h" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
# The LibTorch layer is header-only: it is installed whether or not LibTorch was there for this build.
foreach(_binding IN ITEMS cpp libtorch mpi)
  install(DIRECTORY "${PROJECT_SOURCE_DIR}/bindings/${_binding}/include/" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
    FILES_MATCHING PATTERN "*.h" PATTERN "*.hpp")
endforeach()
# The user's own MPI compiles it.
install(FILES "${PROJECT_SOURCE_DIR}/bindings/mpi/src/fsdp_mpi.c" DESTINATION "${CMAKE_INSTALL_DATADIR}/fsdp")

configure_package_config_file("${PROJECT_SOURCE_DIR}/cmake/fsdpConfig.cmake.in"
  "${PROJECT_BINARY_DIR}/package/fsdpConfig.cmake" INSTALL_DESTINATION "${_package_dir}")
configure_file("${PROJECT_SOURCE_DIR}/cmake/fsdpTargets.cmake.in"
  "${PROJECT_BINARY_DIR}/package/fsdpTargets.cmake" @ONLY)
# Before 1.0 a minor version may change the interface.
write_basic_package_version_file("${PROJECT_BINARY_DIR}/package/fsdpConfigVersion.cmake"
  COMPATIBILITY SameMinorVersion)
install(FILES
  "${PROJECT_BINARY_DIR}/package/fsdpConfig.cmake"
  "${PROJECT_BINARY_DIR}/package/fsdpConfigVersion.cmake"
  "${PROJECT_BINARY_DIR}/package/fsdpTargets.cmake"
  "${PROJECT_SOURCE_DIR}/cmake/FindLibTorch.cmake"
  DESTINATION "${_package_dir}")

file(RELATIVE_PATH FSDP_PC_TO_PREFIX "/prefix/${_pc_dir}" "/prefix")
string(REGEX REPLACE "/$" "" FSDP_PC_TO_PREFIX "${FSDP_PC_TO_PREFIX}")
list(TRANSFORM FSDP_STATIC_LIBS PREPEND "-l" OUTPUT_VARIABLE _private)
list(JOIN _private " " FSDP_PC_LIBS_PRIVATE)
configure_file("${PROJECT_SOURCE_DIR}/cmake/fsdp.pc.in" "${PROJECT_BINARY_DIR}/package/fsdp.pc" @ONLY)
install(FILES "${PROJECT_BINARY_DIR}/package/fsdp.pc" DESTINATION "${_pc_dir}")
