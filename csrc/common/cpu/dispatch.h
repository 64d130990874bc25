#pragma once
#include <string>
#include <vector>

// Instruction sets of this processor and this build, least capable first. The last one is used unless OPDKERNELS_ISA or
// use_isa names another.
std::vector<std::string> available_isas();
std::string current_isa();
void use_isa(const std::string& name);  // throws std::invalid_argument
