//! A model described in JSON: a module has a class, parameters, tied parameters and modules, in the order in which the
//! program registers them; all of it is optional.
//!
//! ```json
//! { "class": "Llama",
//!   "parameters": { "scale": [], "frozen": { "shape": [128, 64], "trained": false, "dtype": "bfloat16" } },
//!   "modules": {
//!     "embed": { "class": "Embedding", "parameters": { "weight": [32000, 512] } },
//!     "layers": { "repeat": 8, "class": "Block", "parameters": { "weight": [512, 512] } },
//!     "head": { "class": "Linear", "tied": { "weight": "embed.weight" } } } }
//! ```
//!
//! `repeat`: N modules "0" to "N-1" of this description, inside one of the given name. `tied`: the full name of the
//! parameter that it is. `dtype`: what the parameter is registered with, float32 (the default), float16 or bfloat16. Dots in the name of a parameter make modules on the way.

use super::Described;
use fsdp::dtype::DType;
use fsdp::module::{ModuleId, ModuleTree, ROOT};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use std::collections::HashMap;
use std::fmt;
use std::marker::PhantomData;

/// Most modules that `repeat` may make of one.
const MAX_REPEAT: u32 = 100_000;
/// What a module is called whose description gives no class.
pub const NO_CLASS: &str = "Module";

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Module {
    class: Option<String>,
    repeat: Option<u32>,
    #[serde(default)]
    parameters: Pairs<Parameter>,
    #[serde(default)]
    tied: Pairs<String>,
    #[serde(default)]
    modules: Pairs<Module>,
}

#[derive(serde::Deserialize)]
#[serde(
    untagged,
    expecting = "a shape, or {\"shape\": [...], \"trained\": true or false, \"dtype\": \"...\"}, is expected"
)]
enum Parameter {
    Shape(Vec<i64>),
    Full(FullParameter),
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct FullParameter {
    shape: Vec<i64>,
    #[serde(default = "yes")]
    trained: bool,
    dtype: Option<String>,
}

fn yes() -> bool {
    true
}

/// A JSON object in its own order.
struct Pairs<T>(Vec<(String, T)>);

impl<T> Default for Pairs<T> {
    fn default() -> Pairs<T> {
        Pairs(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Pairs<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Pairs<T>, D::Error> {
        struct InOrder<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for InOrder<T> {
            type Value = Pairs<T>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs<T>, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(InOrder(PhantomData))
    }
}

/// Builds a tree of parameters by their full names, making the modules on the way.
pub struct Builder {
    tree: ModuleTree,
    modules: HashMap<String, ModuleId>,
    params: HashMap<String, u32>,
    ignored: Vec<String>,
    ignore_used: Vec<bool>,
}

impl Builder {
    /// `ignored`: patterns of parameters to leave out.
    pub fn new(class: &str, ignored: &[String]) -> Builder {
        Builder {
            tree: ModuleTree::new(class),
            modules: HashMap::from([(String::new(), ROOT)]),
            params: HashMap::new(),
            ignored: ignored.to_vec(),
            ignore_used: vec![false; ignored.len()],
        }
    }

    /// Whether a parameter is to be left out.
    pub fn ignores(&mut self, name: &str) -> bool {
        let mut ignores = false;
        for (pattern, used) in self.ignored.iter().zip(&mut self.ignore_used) {
            if super::pattern::matches(pattern, name) {
                (*used, ignores) = (true, true);
            }
        }
        ignores
    }

    /// The module `name` below `parent`; made if it is new.
    fn module(&mut self, parent: ModuleId, name: &str, class: Option<&str>) -> Result<ModuleId, String> {
        let fqn = join(&self.tree.modules()[parent as usize].fqn, name);
        if let Some(module) = self.modules.get(&fqn) {
            return Ok(*module);
        }
        let module = self.tree.add_module(parent, name, class.unwrap_or(NO_CLASS)).map_err(|e| e.message)?;
        self.modules.insert(fqn, module);
        Ok(module)
    }

    /// Adds a parameter whose name may have dots.
    pub fn param(
        &mut self,
        mut module: ModuleId,
        name: &str,
        shape: &[i64],
        dtype: DType,
        trained: bool,
    ) -> Result<(), String> {
        let fqn = join(&self.tree.modules()[module as usize].fqn, name);
        if self.ignores(&fqn) {
            return Ok(());
        }
        let mut parts: Vec<&str> = name.split('.').collect();
        let own = parts.pop().unwrap_or(name);
        for part in parts {
            module = self.module(module, part, None)?;
        }
        let param = self.tree.add_param(module, own, shape, dtype, trained, std::ptr::null());
        self.params.insert(fqn, param.map_err(|e| e.message)?);
        Ok(())
    }

    pub fn finish(self, notes: Vec<String>) -> Result<Described, String> {
        if let Some(unused) = self.ignore_used.iter().position(|used| !used) {
            return Err(format!("--ignore '{}': no parameter has such a name", self.ignored[unused]));
        }
        if self.tree.params().is_empty() {
            return Err("the model has no parameters".to_string());
        }
        Ok(Described { tree: self.tree, notes })
    }

    fn fill(
        &mut self,
        module: ModuleId,
        from: &Module,
        ties: &mut Vec<(ModuleId, String, String)>,
    ) -> Result<(), String> {
        for (name, p) in &from.parameters.0 {
            let (shape, dtype, trained) = match p {
                Parameter::Shape(shape) => (shape, DType::F32, true),
                Parameter::Full(p) => (&p.shape, dtype_of(p, name)?, p.trained),
            };
            self.param(module, name, shape, dtype, trained)?;
        }
        ties.extend(from.tied.0.iter().map(|(name, target)| (module, name.clone(), target.clone())));
        for (name, below) in &from.modules.0 {
            let class = below.class.as_deref();
            match below.repeat {
                None => {
                    let child = self.module(module, name, class)?;
                    self.fill(child, below, ties)?;
                }
                Some(count) if count > MAX_REPEAT => {
                    return Err(format!("module \"{name}\" is repeated {count} times: at most {MAX_REPEAT}"));
                }
                Some(count) => {
                    let list = self.module(module, name, None)?;
                    for i in 0..count {
                        let child = self.module(list, &i.to_string(), class)?;
                        self.fill(child, below, ties)?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// The type that a parameter is registered with.
fn dtype_of(p: &FullParameter, name: &str) -> Result<DType, String> {
    let Some(text) = &p.dtype else { return Ok(DType::F32) };
    let known = DType::ALL.into_iter().find(|d| d.name() == text && fsdp::precision::can_compute(*d));
    known.ok_or_else(|| format!("parameter \"{name}\" cannot be {text}: float32, float16 and bfloat16 are supported"))
}

fn join(parent: &str, name: &str) -> String {
    if parent.is_empty() {
        name.to_string()
    } else {
        format!("{parent}.{name}")
    }
}

/// The model that `text` describes.
pub fn read(text: &str, ignored: &[String]) -> Result<Described, String> {
    let root: Module = serde_json::from_str(text).map_err(|e| e.to_string())?;
    if root.repeat.is_some() {
        return Err("the root module cannot be repeated".to_string());
    }
    let mut builder = Builder::new(root.class.as_deref().unwrap_or(NO_CLASS), ignored);
    let mut ties = Vec::new();
    builder.fill(ROOT, &root, &mut ties)?;
    for (module, name, target) in ties {
        let Some(param) = builder.params.get(&target) else {
            return Err(format!("\"{name}\" is tied to \"{target}\", which the model has not"));
        };
        builder.tree.tie_param(module, &name, *param).map_err(|e| e.message)?;
    }
    builder.finish(Vec::new())
}
