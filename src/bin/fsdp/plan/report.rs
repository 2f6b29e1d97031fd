//! How `fsdp plan` shows a forecast: a table for people, JSON for programs.

use super::{strategy_name, Described, PlanArgs};
use crate::text::{bytes, count, print};
use fsdp::comm::shm::MAX_WORLD;
use fsdp::forecast::{Forecast, Traffic};
use serde_json::{json, Value};
use std::time::Duration;

/// Prints JSON; returns the exit status.
pub fn json(args: &PlanArgs, f: &Forecast, model: &Described) -> i32 {
    let traffic = |t: &Traffic| {
        json!({
            "collectives": t.collectives,
            "bytes": t.bytes,
            "sent_bytes": t.sent_bytes,
            "sent_messages": t.sent_messages,
        })
    };
    let units: Vec<Value> = f
        .units
        .iter()
        .map(|u| {
            json!({
                "name": u.name,
                "parameters": u.params,
                "numel": u.numel,
                "bytes": u.bytes,
                "shard_bytes": u.shard_bytes,
                "padding_bytes": u.padding_bytes,
                "all_gather": traffic(&u.all_gather),
                "reduce_scatter": traffic(&u.reduce_scatter),
                "all_reduce": traffic(&u.all_reduce),
            })
        })
        .collect();
    let all = json!({
        "world_size": f.world_size,
        "strategy": strategy_name(args.strategy),
        "shard_size": args.shard_size,
        "device": args.device,
        "cpu_offload": args.cpu_offload,
        "reduce_dtype": args.reduce_dtype,
        "param_dtype": args.param_dtype,
        "grads_in_param_dtype": args.grads_in_param_dtype,
        "optimizer_bytes_per_element": args.optimizer,
        "numel": f.numel,
        "trained_numel": f.trained_numel,
        "rank": f.rank,
        "param_shard_bytes": f.param_shard_bytes,
        "grad_shard_bytes": f.grad_shard_bytes,
        "optimizer_bytes": f.optimizer_bytes,
        "gradient_slot_bytes": f.gradient_slot_bytes,
        "shard_padding_bytes": f.shard_padding_bytes,
        "padding_bytes": f.padding_bytes,
        "unit_buffer_bytes": f.unit_buffer_bytes,
        "compute_buffer_bytes": f.compute_buffer_bytes,
        "all_gather_bytes_moved": f.cast_bytes,
        "unsharded_peak_bytes": f.unsharded_peak_bytes,
        "pool_bytes": f.pool_bytes,
        "device_peak_bytes": f.device_peak_bytes,
        "offloaded_bytes": f.offloaded_bytes,
        "rank_peak_bytes": f.rank_peak_bytes,
        "host_peak_bytes": f.host_peak_bytes,
        "all_gather": traffic(&f.all_gather),
        "reduce_scatter": traffic(&f.reduce_scatter),
        "all_reduce": traffic(&f.all_reduce),
        "units": units,
        "notes": model.notes,
    });
    print(&format!("{all:#}\n"))
}

/// Prints a table; returns the exit status.
pub fn table(args: &PlanArgs, f: &Forecast, model: &Described, took: Duration) -> i32 {
    let mut text = String::new();
    let mut line = |name: &str, value: String, note: &str| {
        text += format!("  {name:<28}{value:>14}   {note}").trim_end();
        text += "\n";
    };
    let percent = 100.0 * f.padding_bytes as f64 / (f.padding_bytes + 4 * f.numel) as f64;
    line("model", count(f.numel), &format!("parameters, {} units, {} trained", f.units.len(), count(f.trained_numel)));
    line(
        "world size",
        f.world_size.to_string(),
        &format!(
            "{}, computed as {}, reduced as {}",
            strategy_name(args.strategy),
            args.param_dtype,
            args.reduce_dtype
        ),
    );
    line("padding", bytes(f.padding_bytes), &format!("{percent:.4} % of all unit buffers"));
    let whose = if args.rank.is_some() { "" } else { ", the one with the most" };
    line("", String::new(), "");
    line(&format!("rank {}{whose}", f.rank), String::new(), "");
    let on_gpu = args.device == "cuda";
    line("  parameter shards", bytes(f.param_shard_bytes), &format!("{} of it padding", bytes(f.shard_padding_bytes)));
    line("  gradient shards", bytes(f.grad_shard_bytes), "");
    line("  optimizer state", bytes(f.optimizer_bytes), &format!("{} bytes per element", args.optimizer));
    line("  gradient slots", bytes(f.gradient_slot_bytes), "for units' full gradients");
    if on_gpu {
        line("  unit buffers", bytes(f.pool_bytes), "the fixed pool that units are gathered into");
        let rest = if args.cpu_offload { "pool and slots; the rest is in host memory" } else { "all of these" };
        line("  peak on its GPU", bytes(f.device_peak_bytes), &format!("{rest}; activations come on top"));
    } else {
        let offloaded = if args.cpu_offload { ", and a second copy of the shards" } else { "" };
        line("  peak", bytes(f.rank_peak_bytes), &format!("all of these{offloaded}"));
    }
    let where_bytes_move = match on_gpu {
        true => "most, along a path of nested units",
        false => "more where bytes move; on shm it is there already",
    };
    line("  unsharded at once", bytes(f.unsharded_peak_bytes), where_bytes_move);
    if on_gpu && args.cpu_offload {
        line("  all ranks' host memory", bytes(f.host_peak_bytes), "where they are on one host");
    }
    if !on_gpu && f.world_size <= MAX_WORLD {
        line("", String::new(), "");
        line("one host with all ranks (shm)", String::new(), "");
        line("  unit buffers", bytes(f.unit_buffer_bytes), "the shards of all ranks, once");
        if f.compute_buffer_bytes > 0 {
            line("  copies in 16 bits", bytes(f.compute_buffer_bytes), "to compute with, once");
        }
        line("  peak", bytes(f.host_peak_bytes), "with all ranks' gradients and optimizer state");
    }
    line("", String::new(), "");
    line("a step, on each rank", String::new(), "");
    let kinds =
        [("all-gathers", &f.all_gather), ("reduce-scatters", &f.reduce_scatter), ("all-reduces", &f.all_reduce)];
    for (name, t) in kinds.into_iter().filter(|(name, t)| *name != "all-reduces" || t.collectives > 0) {
        line(&format!("  {name}"), t.collectives.to_string(), &format!("of {} in all", bytes(t.bytes)));
        line(
            if on_gpu { "    sent" } else { "    sent where bytes move" },
            bytes(t.sent_bytes),
            &format!("in {} messages{}", t.sent_messages, if on_gpu { "" } else { "; nothing on shm" }),
        );
    }
    if args.units {
        text += &format!("\n  {:<40}{:>14}{:>14}{:>12}\n", "unit", "parameters", "shard", "padding");
        for u in &f.units {
            let name = if u.name.is_empty() { "(root)" } else { &u.name };
            let (shard, padding) = (bytes(u.shard_bytes), bytes(u.padding_bytes));
            text += &format!("  {name:<40}{:>14}{shard:>14}{padding:>12}\n", count(u.numel));
        }
    }
    text += "\n";
    for note in &model.notes {
        text += &format!("  note: {note}\n");
    }
    text += &format!("  planned in {:.4} s\n", took.as_secs_f64());
    print(&text)
}
