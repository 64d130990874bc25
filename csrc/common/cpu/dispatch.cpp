// Which instruction set is used: what the processor reports, or what the user names.
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace {
struct Choice { std::string name; const Kernels* kernels; };

std::vector<Choice> choices() {
  std::vector<Choice> list{{"baseline", kernels_baseline()}};
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();  // includes whether the operating system saves the wide registers
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    list.push_back({"avx2", kernels_avx2()});
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
          __builtin_cpu_supports("avx512vbmi2"))
    list.push_back({"avx512", kernels_avx512()});
#endif
  return list;
}

const std::vector<Choice>& known() { static const std::vector<Choice> list = choices(); return list; }

const Choice& find(const std::string& name) {
  for (const Choice& choice : known())
    if (choice.name == name) return choice;
  std::string have;
  for (const Choice& choice : known()) have += (have.empty() ? "" : ", ") + choice.name;
  throw std::invalid_argument("instruction set " + name + " is not available here; choose one of " + have);
}

const Choice*& current() {
  static const Choice* choice = [] {
    const char* wanted = std::getenv("OPDKERNELS_ISA");
    return wanted && *wanted ? &find(wanted) : &known().back();
  }();
  return choice;
}
}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Choice& choice : known()) names.push_back(choice.name);
  return names;
}
std::string current_isa() { return current()->name; }
void use_isa(const std::string& name) { current() = &find(name); }
const Kernels& kernels() { return *current()->kernels; }
