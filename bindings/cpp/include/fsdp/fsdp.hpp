// The whole C++ layer over fsdp.h: exceptions, communicator, model description, plans, traces,
// engine, optimizer, gradient scaler, full parameters, checkpoints, devices, log.
//
// Header-only C++17; link libfsdp. Handles are shared: copying a Communicator, Model, Trace,
// Engine, Optimizer, GradScaler, FullParams or CheckpointJob copies a reference, and the last one
// destroys the C handle. Every function throws fsdp::Error when the C call behind it fails, and is
// otherwise as documented in fsdp.h.
#pragma once

#include "fsdp/checkpoint.hpp"
#include "fsdp/comm_hook.hpp"
#include "fsdp/communicator.hpp"
#include "fsdp/device.hpp"
#include "fsdp/engine.hpp"
#include "fsdp/error.hpp"
#include "fsdp/full_params.hpp"
#include "fsdp/grad_scaler.hpp"
#include "fsdp/heap.hpp"
#include "fsdp/log.hpp"
#include "fsdp/model.hpp"
#include "fsdp/optimizer.hpp"
#include "fsdp/plan.hpp"
#include "fsdp/tensor_view.hpp"
#include "fsdp/trace.hpp"
