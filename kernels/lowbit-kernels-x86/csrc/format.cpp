#include "format.h"

#include <stdexcept>
#include <vector>

namespace lowbit {
namespace {

[[noreturn]] void refuse(const std::string& spec, const std::string& what) {
  throw std::runtime_error("lowbit_x86 takes no format '" + spec + "': " + what);
}

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts;
  size_t begin = 0;
  for (size_t end; (end = text.find(at, begin)) != std::string::npos; begin = end + 1) {
    parts.push_back(text.substr(begin, end - begin));
  }
  parts.push_back(text.substr(begin));
  return parts;
}

Element element_of(const std::string& spec, const std::string& name) {
  if (name == "e4m3fn") return {true, true, 8, 4, 3, 7};
  if (name == "e5m2") return {true, true, 8, 5, 2, 15};
  if (name == "e3m2") return {true, true, 6, 3, 2, 3};
  if (name == "e2m3") return {true, true, 6, 2, 3, 1};
  if (name == "e2m1") return {true, true, 4, 2, 1, 1};
  const bool is_unsigned = name.rfind("uint", 0) == 0;
  const size_t digits = is_unsigned ? 4 : 3;
  if ((is_unsigned || name.rfind("int", 0) == 0) && name.size() == digits + 1) {
    const int bits = name[digits] - '0';
    if (1 <= bits && bits <= 8) return {false, !is_unsigned, bits, 0, 0, 0};
  }
  refuse(spec, "element " + name);
}

Scale scale_of(const std::string& spec, const std::string& name) {
  if (name == "float32") return Scale::float32;
  if (name == "bfloat16") return Scale::bfloat16;
  if (name == "float16") return Scale::float16;
  if (name == "e8m0") return Scale::e8m0;
  if (name == "e4m3fn") return Scale::e4m3fn;
  refuse(spec, "scale " + name);
}

}  // namespace

Format parse(const std::string& spec) {
  const auto parts = split(spec, ':');
  if (parts.size() < 3) refuse(spec, "needed is element:block:scale[:zero=element][:tensor]");
  const auto block = split(parts[1], 'x');
  if (block.size() != 2) refuse(spec, "blocks of " + std::to_string(block.size()) + " dimensions");
  auto length = [&](const std::string& text) -> int64_t {
    if (text == "*") return 0;
    const bool digits = !text.empty() && text.size() < 10 && text.find_first_not_of("0123456789") == text.npos;
    if (!digits || text[0] == '0') refuse(spec, "a block of length '" + text + "'");
    return std::stoll(text);
  };
  Format format{element_of(spec, parts[0]), length(block[0]), length(block[1]), scale_of(spec, parts[2])};
  for (size_t i = 3; i < parts.size(); ++i) {
    if (parts[i] == "tensor") {
      format.tensor_scale = true;
    } else if (parts[i].rfind("zero=", 0) == 0) {
      format.zero = true;
      format.zero_signed = element_of(spec, parts[i].substr(5)).is_signed;
    } else {
      refuse(spec, parts[i]);
    }
  }
  return format;
}

}  // namespace lowbit
