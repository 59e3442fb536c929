// Where ggml's CPU backend asks pyps before it computes a node, and what pyps answers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pyps::kernels {

// Stands in front of ggml's own choice, for the whole process and for good. Throws EngineError if ggml does not ask.
void install();

// The names of all kernels that were compiled, best first; and whether this CPU can run them.
std::vector<std::string> names();
bool                     runs_here(const std::string & name);

// The names of the weights' types that they multiply.
std::vector<std::string> types(const std::string & name);

// Uses these kernels for every graph that is planned from now on; an empty name for none of ours.
void use(const std::string & name);

std::string in_use();

// How many nodes were computed by ours since the process began.
uint64_t computed();

}  // namespace pyps::kernels
