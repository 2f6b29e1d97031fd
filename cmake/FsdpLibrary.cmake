# The Rust part: an always-run target that calls cargo, and the imported targets fsdp::fsdp and fsdp::fsdp_static
# with what it built. Cargo decides what is stale; the files that CMake's targets depend on are only replaced when
# they changed, so that an unchanged library relinks nothing.

find_program(FSDP_CARGO cargo HINTS "$ENV{CARGO_HOME}/bin" "$ENV{HOME}/.cargo/bin" DOC "Rust's cargo")
if(NOT FSDP_CARGO)
  message(FATAL_ERROR "cargo was not found: install Rust (rustup) or set FSDP_CARGO")
endif()
find_package(Threads REQUIRED)

set(FSDP_SONAME "libfsdp.so.${PROJECT_VERSION_MAJOR}")
set(FSDP_REAL_NAME "libfsdp.so.${PROJECT_VERSION}")
# What a program that links the static library needs besides; rustc prints it with --print native-static-libs
# (gcc adds -lgcc_s and -lc by itself, and -lutil is part of libc).
set(FSDP_STATIC_LIBS pthread dl m rt)

set(_cargo_dir "${PROJECT_BINARY_DIR}/cargo")
set(FSDP_LIB_DIR "${PROJECT_BINARY_DIR}/lib")
set(FSDP_TOOL "${PROJECT_BINARY_DIR}/bin/fsdp")
file(MAKE_DIRECTORY "${FSDP_LIB_DIR}" "${PROJECT_BINARY_DIR}/bin")

add_custom_target(fsdp_cargo ALL
  COMMAND "${CMAKE_COMMAND}" -E env "CARGO_TARGET_DIR=${_cargo_dir}"
          "${FSDP_CARGO}" build --release --features cli --manifest-path "${PROJECT_SOURCE_DIR}/Cargo.toml"
  COMMAND "${CMAKE_COMMAND}" -E copy_if_different "${_cargo_dir}/release/libfsdp.so" "${FSDP_LIB_DIR}/${FSDP_REAL_NAME}"
  COMMAND "${CMAKE_COMMAND}" -E copy_if_different "${_cargo_dir}/release/libfsdp.a" "${FSDP_LIB_DIR}/libfsdp.a"
  COMMAND "${CMAKE_COMMAND}" -E copy_if_different "${_cargo_dir}/release/fsdp" "${FSDP_TOOL}"
  BYPRODUCTS "${FSDP_LIB_DIR}/${FSDP_REAL_NAME}" "${FSDP_LIB_DIR}/libfsdp.a" "${FSDP_TOOL}"
  WORKING_DIRECTORY "${PROJECT_SOURCE_DIR}"
  COMMENT "cargo build --release"
  USES_TERMINAL VERBATIM)
# The loader looks for the soname, the linker for the plain name: both exist in the build tree too.
file(CREATE_LINK "${FSDP_REAL_NAME}" "${FSDP_LIB_DIR}/${FSDP_SONAME}" SYMBOLIC)
file(CREATE_LINK "${FSDP_SONAME}" "${FSDP_LIB_DIR}/libfsdp.so" SYMBOLIC)

add_library(fsdp::fsdp SHARED IMPORTED GLOBAL)
set_target_properties(fsdp::fsdp PROPERTIES
  IMPORTED_LOCATION "${FSDP_LIB_DIR}/${FSDP_REAL_NAME}"
  IMPORTED_SONAME "${FSDP_SONAME}"
  INTERFACE_INCLUDE_DIRECTORIES "${PROJECT_SOURCE_DIR}/include")
add_dependencies(fsdp::fsdp fsdp_cargo)

add_library(fsdp::fsdp_static STATIC IMPORTED GLOBAL)
set_target_properties(fsdp::fsdp_static PROPERTIES
  IMPORTED_LOCATION "${FSDP_LIB_DIR}/libfsdp.a"
  INTERFACE_INCLUDE_DIRECTORIES "${PROJECT_SOURCE_DIR}/include"
  INTERFACE_LINK_LIBRARIES "${FSDP_STATIC_LIBS}")
add_dependencies(fsdp::fsdp_static fsdp_cargo)
