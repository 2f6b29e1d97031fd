// Reads a safetensors file: 8 bytes with the header's length, the header as JSON, the tensors'
// bytes.
#include "safetensors_file.h"

#include <cstring>
#include <fstream>
#include <list>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "safetensors files are little-endian");

namespace {

thread_local std::string error_text;

struct Entry {
  std::string dtype;
  std::vector<int64_t> shape;
  // A copy: the file aligns nothing.
  std::vector<std::max_align_t> data;
  int64_t numel;
};

std::size_t size_of(const std::string& dtype) {
  static const std::map<std::string, std::size_t> sizes = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"I16", 2}, {"U16", 2}, {"F16", 2}, {"BF16", 2},
      {"I32", 4},  {"U32", 4}, {"F32", 4}, {"I64", 8}, {"U64", 8}, {"F64", 8}};
  const auto found = sizes.find(dtype);
  if (found == sizes.end()) throw std::runtime_error("unknown dtype " + dtype);
  return found->second;
}

std::string text_of(const std::vector<int64_t>& shape) { return nlohmann::json(shape).dump(); }

}  // namespace

struct safetensors {
  std::string path;
  std::map<std::string, Entry> tensors;
  nlohmann::json about;
  // What safetensors_about has handed out.
  mutable std::list<std::string> texts;
};

namespace {

std::string read_bytes(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error("cannot be opened");
  std::string bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  if (bytes.size() < 8) throw std::runtime_error("is too short");
  return bytes;
}

Entry entry_of(const nlohmann::json& value, const char* data, std::size_t size) {
  Entry entry{value.at("dtype"), value.at("shape"), {}, 1};
  for (const int64_t n : entry.shape) entry.numel *= n;
  const auto begin = value.at("data_offsets").at(0).get<std::size_t>();
  const auto end = value.at("data_offsets").at(1).get<std::size_t>();
  if (begin > end || end > size ||
      end - begin != static_cast<std::size_t>(entry.numel) * size_of(entry.dtype)) {
    throw std::runtime_error("its bytes and its shape do not fit");
  }
  const std::size_t word = sizeof(std::max_align_t);
  entry.data.resize((end - begin + word - 1) / word);
  if (end > begin) std::memcpy(entry.data.data(), data + begin, end - begin);
  return entry;
}

void read_file(safetensors& file) {
  const std::string bytes = read_bytes(file.path);
  uint64_t length;
  std::memcpy(&length, bytes.data(), 8);
  if (length > bytes.size() - 8) throw std::runtime_error("its header is cut off");
  const auto header = nlohmann::json::parse(bytes.substr(8, length));
  const char* data = bytes.data() + 8 + length;
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") {
      if (value.contains("about")) {
        file.about = nlohmann::json::parse(value["about"].get<std::string>());
      }
      continue;
    }
    try {
      file.tensors.emplace(name, entry_of(value, data, bytes.size() - 8 - length));
    } catch (const std::exception& e) {
      throw std::runtime_error("tensor \"" + name + "\": " + e.what());
    }
  }
}

// Runs `body`; what it throws becomes the error text, and `failed` the result.
template <class Result, class Body>
Result guarded(const std::string& path, Result failed, Body body) {
  try {
    return body();
  } catch (const std::exception& e) {
    error_text = path + ": " + e.what();
    return failed;
  }
}

const Entry& find(const safetensors_t* file, const char* name) {
  const auto found = file->tensors.find(name);
  if (found == file->tensors.end()) {
    throw std::runtime_error(std::string("there is no tensor \"") + name + "\"");
  }
  return found->second;
}

}  // namespace

safetensors_t* safetensors_open(const char* path) {
  auto* file = new safetensors{path, {}, {}, {}};
  const bool good = guarded(path, false, [&] { return read_file(*file), true; });
  if (good) return file;
  delete file;
  return nullptr;
}

void safetensors_close(safetensors_t* file) { delete file; }

size_t safetensors_count(const safetensors_t* file) { return file->tensors.size(); }

const char* safetensors_name(const safetensors_t* file, size_t index) {
  if (index >= file->tensors.size()) {
    error_text = file->path + ": there is no tensor number " + std::to_string(index);
    return nullptr;
  }
  return std::next(file->tensors.begin(), static_cast<std::ptrdiff_t>(index))->first.c_str();
}

int safetensors_tensor(const safetensors_t* file, const char* name, safetensors_tensor_t* out) {
  return guarded(file->path, -1, [&] {
    const Entry& entry = find(file, name);
    *out = {entry.dtype.c_str(), static_cast<int32_t>(entry.shape.size()), entry.shape.data(),
            entry.data.data(), entry.numel};
    return 0;
  });
}

const float* safetensors_f32(const safetensors_t* file, const char* name, int32_t ndim,
                             const int64_t* shape) {
  return guarded(file->path, static_cast<const float*>(nullptr), [&] {
    const Entry& entry = find(file, name);
    const std::vector<int64_t> wanted(shape, shape + ndim);
    if (entry.dtype != "F32" || entry.shape != wanted) {
      throw std::runtime_error(std::string("tensor \"") + name + "\" is " + entry.dtype + " " +
                               text_of(entry.shape) + ", not F32 " + text_of(wanted));
    }
    return reinterpret_cast<const float*>(entry.data.data());
  });
}

const char* safetensors_about(const safetensors_t* file, const char* pointer) {
  return guarded(file->path, static_cast<const char*>(nullptr), [&] {
    const auto& value = file->about.at(nlohmann::json::json_pointer(pointer));
    file->texts.push_back(value.is_string() ? value.get<std::string>() : value.dump());
    return file->texts.back().c_str();
  });
}

const char* safetensors_error(void) { return error_text.c_str(); }
