# Finds LibTorch, as a downloaded LibTorch, as a PyPI wheel (whose own package file insists on a CUDA toolkit even
# for CPU programs), or in any prefix, and links libtorch_cpu and libc10 directly. Installed with fsdp, whose
# package file uses it.
#
# Looked for in, the first that is set deciding: TORCH_DIR, Torch_DIR (variables, then environment; naming a folder
# without LibTorch is an error), a Torch package that was already found, CMAKE_PREFIX_PATH and the system's prefixes.
#
# Result: LibTorch_FOUND, LibTorch_VERSION, LibTorch_ROOT_DIR, and the target LibTorch::LibTorch.

include(FindPackageHandleStandardArgs)

# Sets ${out} to the root of the LibTorch at, around or below the folder, or to "".
function(_libtorch_root folder out)
  set(${out} "" PARENT_SCOPE)
  foreach(_candidate IN ITEMS "${folder}" "${folder}/../../.." "${folder}/torch" "${folder}/libtorch")
    if(EXISTS "${_candidate}/lib/libtorch_cpu.so"
       AND EXISTS "${_candidate}/include/torch/csrc/api/include/torch/torch.h")
      get_filename_component(_root "${_candidate}" REALPATH)
      set(${out} "${_root}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
endfunction()

set(LibTorch_ROOT_DIR "")
set(_libtorch_reason "")
foreach(_name IN ITEMS TORCH_DIR Torch_DIR ENV_TORCH_DIR ENV_Torch_DIR)
  if(_name MATCHES "^ENV_(.*)$")
    set(_given "$ENV{${CMAKE_MATCH_1}}")
    set(_shown "${CMAKE_MATCH_1} (environment)")
  else()
    set(_given "${${_name}}")
    set(_shown "${_name}")
  endif()
  # A find_package(Torch) that failed leaves Torch_DIR-NOTFOUND.
  if(_given AND NOT LibTorch_ROOT_DIR AND NOT _libtorch_reason)
    _libtorch_root("${_given}" LibTorch_ROOT_DIR)
    if(NOT LibTorch_ROOT_DIR)
      set(_libtorch_reason "${_shown}=${_given} holds no lib/libtorch_cpu.so with its headers")
    endif()
  endif()
endforeach()
if(NOT LibTorch_ROOT_DIR AND NOT _libtorch_reason)
  if(TORCH_INSTALL_PREFIX)
    _libtorch_root("${TORCH_INSTALL_PREFIX}" LibTorch_ROOT_DIR)
  endif()
  set(_prefixes ${CMAKE_PREFIX_PATH})
  string(REPLACE ":" ";" _environment "$ENV{CMAKE_PREFIX_PATH}")
  list(APPEND _prefixes ${_environment} ${CMAKE_SYSTEM_PREFIX_PATH})
  foreach(_prefix IN LISTS _prefixes)
    if(NOT LibTorch_ROOT_DIR)
      _libtorch_root("${_prefix}" LibTorch_ROOT_DIR)
    endif()
  endforeach()
endif()

if(LibTorch_ROOT_DIR)
  set(_include "${LibTorch_ROOT_DIR}/include")
  set(LibTorch_VERSION "")
  foreach(_header IN ITEMS torch/headeronly/version.h torch/csrc/api/include/torch/version.h)
    if(NOT LibTorch_VERSION AND EXISTS "${_include}/${_header}")
      file(READ "${_include}/${_header}" _text)
      if(_text MATCHES "TORCH_VERSION_MAJOR ([0-9]+).*TORCH_VERSION_MINOR ([0-9]+).*TORCH_VERSION_PATCH ([0-9]+)")
        set(LibTorch_VERSION "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}.${CMAKE_MATCH_3}")
      endif()
    endif()
  endforeach()
endif()

find_package_handle_standard_args(LibTorch
  REQUIRED_VARS LibTorch_ROOT_DIR LibTorch_VERSION
  VERSION_VAR LibTorch_VERSION
  REASON_FAILURE_MESSAGE "${_libtorch_reason}")

if(LibTorch_FOUND AND NOT TARGET LibTorch::LibTorch)
  # Its libraries must agree with the program on the C++ library's layout, and its headers ask for a standard.
  set(_definitions "")
  set(_config "${LibTorch_ROOT_DIR}/share/cmake/Torch/TorchConfig.cmake")
  set(_standard cxx_std_17)
  if(EXISTS "${_config}")
    file(READ "${_config}" _text)
    if(_text MATCHES "_GLIBCXX_USE_CXX11_ABI=([01])")
      set(_definitions "_GLIBCXX_USE_CXX11_ABI=${CMAKE_MATCH_1}")
    endif()
    if(_text MATCHES "cxx_std_20")
      set(_standard cxx_std_20)
    endif()
  endif()
  add_library(LibTorch::c10 SHARED IMPORTED)
  set_target_properties(LibTorch::c10 PROPERTIES IMPORTED_LOCATION "${LibTorch_ROOT_DIR}/lib/libc10.so")
  add_library(LibTorch::torch_cpu SHARED IMPORTED)
  set_target_properties(LibTorch::torch_cpu PROPERTIES
    IMPORTED_LOCATION "${LibTorch_ROOT_DIR}/lib/libtorch_cpu.so")
  add_library(LibTorch::LibTorch INTERFACE IMPORTED)
  set_target_properties(LibTorch::LibTorch PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES "${_include};${_include}/torch/csrc/api/include"
    INTERFACE_COMPILE_DEFINITIONS "${_definitions}"
    INTERFACE_COMPILE_FEATURES "${_standard}"
    INTERFACE_LINK_LIBRARIES "LibTorch::torch_cpu;LibTorch::c10")
endif()
