# The kernels' sources and what they are compiled with, for the extension (CMakeLists.txt) and for the check program
# (native/check). Every instruction set is compiled for itself and chosen at run time.
include(CheckCXXCompilerFlag)

function(pyps_add_kernels target llama_dir)
  set(dir "${CMAKE_CURRENT_FUNCTION_LIST_DIR}")
  target_sources(${target} PRIVATE "${dir}/hook.cpp" "${dir}/product_node.cpp" "${dir}/attention_node.cpp"
                                   "${dir}/probe.cpp")
  target_include_directories(${target} SYSTEM PRIVATE "${llama_dir}/ggml/src" "${llama_dir}/ggml/src/ggml-cpu"
                                                      "${llama_dir}/ggml/include")
  target_compile_options(${target} PRIVATE -Wall -Wextra)

  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$" AND CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
    # vectors of single values that were gathered for later are slower than the single values
    set(common $<IF:$<CONFIG:Debug>,-O1,-O3> -fno-tree-slp-vectorize -mavx2 -mfma -mf16c)
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
      list(APPEND common -Wno-maybe-uninitialized)  # GCC 12's own intrinsics
    endif()
    set(flags_avx2 -mavx2)
    set(flags_avxvnni -mavxvnni)
    set(flags_avx512vnni -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni)
    foreach(name avx2 avxvnni avx512vnni)
      string(TOUPPER "${name}" upper)
      list(JOIN flags_${name} " " all)
      check_cxx_compiler_flag("${all}" COMPILES_${upper})
      if(COMPILES_${upper})
        target_sources(${target} PRIVATE "${dir}/${name}.cpp")
        set_source_files_properties("${dir}/${name}.cpp" PROPERTIES COMPILE_OPTIONS "${common};${flags_${name}}")
        target_compile_definitions(${target} PRIVATE PYPS_${upper})
      endif()
    endforeach()
  endif()
endfunction()
