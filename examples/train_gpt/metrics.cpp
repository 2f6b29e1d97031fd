// Writes and cuts back metrics.jsonl.
#include "metrics.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <system_error>

using nlohmann::json;

namespace {

[[noreturn]] void fail(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

}  // namespace

void truncate_metrics(const std::string& file, std::int64_t last_step) {
  const std::string aside = file + ".partial";
  {
    std::ifstream before(file);
    std::ofstream after(aside, std::ios::trunc);
    for (std::string line; std::getline(before, line);) {
      const json object = json::parse(line, nullptr, /*allow_exceptions=*/false);
      if (!object.is_object() || object.value("step", last_step + 1) > last_step) break;
      after << line << '\n';
    }
    if (!after.flush()) fail("cannot write '" + aside + "'");
  }
  std::filesystem::rename(aside, file);
}

MetricsWriter::MetricsWriter(const std::string& file)
    : fd_(::open(file.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666)) {
  if (fd_ < 0) fail("cannot open '" + file + "'");
}

MetricsWriter::~MetricsWriter() { ::close(fd_); }

void MetricsWriter::write(const StepMetrics& m) {
  nlohmann::ordered_json object{{"step", m.step}, {"loss", m.loss}};
  if (m.val_loss) object["val_loss"] = *m.val_loss;
  object.update({{"lr", m.lr},
                 {"grad_norm", m.grad_norm},
                 {"step_s", m.step_s},
                 {"tokens_per_s", m.tokens_per_s},
                 {"rank_state_bytes", m.rank_state_bytes},
                 {"host_peak_bytes", m.host_peak_bytes}});
  const std::string line = object.dump() + "\n";
  const ssize_t written = ::write(fd_, line.data(), line.size());
  if (written != static_cast<ssize_t>(line.size())) {
    if (written >= 0) errno = ENOSPC;
    fail("cannot write a line of metrics");
  }
}
