# find_package(dit4dit): the target dit4dit::action_stream, headers only (C++17, Linux), without Python.
#
#   cmake -S . -B build -Ddit4dit_DIR="$(python -m dit4dit.control --cmake-dir)"
#
#   find_package(dit4dit REQUIRED)
#   target_link_libraries(controller PRIVATE dit4dit::action_stream)
#
# No flags are set for your code. The headers keep their own arithmetic exact, so that commands are those of the Python package bit
# for bit under -O3 -march=native too; -ffast-math is refused.

if(NOT CMAKE_SYSTEM_NAME STREQUAL "Linux")
  set(dit4dit_FOUND FALSE)
  set(dit4dit_NOT_FOUND_MESSAGE "dit4dit::action_stream needs Linux (/dev/shm, file locks), not ${CMAKE_SYSTEM_NAME}")
  return()
endif()

include(CMakeFindDependencyMacro)
find_dependency(Threads)

if(NOT TARGET dit4dit::action_stream)
  get_filename_component(_dit4dit_include "${CMAKE_CURRENT_LIST_DIR}/../include" ABSOLUTE)
  add_library(dit4dit::action_stream INTERFACE IMPORTED)
  # no librt: none of what the headers call was ever in it
  set_target_properties(dit4dit::action_stream PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES "${_dit4dit_include}"
    INTERFACE_COMPILE_FEATURES cxx_std_17
    INTERFACE_LINK_LIBRARIES Threads::Threads)
  unset(_dit4dit_include)
endif()
