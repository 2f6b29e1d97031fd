//! Patterns over dotted names: `*` is anything but a dot, `**` anything, the rest itself.

use fsdp::module::{ModuleTree, ROOT};

/// Whether all of `name` fits the pattern.
pub fn matches(pattern: &str, name: &str) -> bool {
    let fits_rest = |rest: &str, stop: fn(char) -> bool| {
        // Any prefix up to the first character that the star does not cover.
        let end = name.find(stop).unwrap_or(name.len());
        let cuts = name[..end].char_indices().map(|(i, _)| i).chain([end]);
        cuts.into_iter().any(|i| matches(rest, &name[i..]))
    };
    if let Some(rest) = pattern.strip_prefix("**") {
        return fits_rest(rest, |_| false);
    }
    if let Some(rest) = pattern.strip_prefix('*') {
        return fits_rest(rest, |c| c == '.');
    }
    match (pattern.chars().next(), name.chars().next()) {
        (None, None) => true,
        (Some(p), Some(n)) if p == n => matches(&pattern[p.len_utf8()..], &name[n.len_utf8()..]),
        _ => false,
    }
}

/// Makes every module whose name fits a unit; an error when there is none.
pub fn wrap(tree: &mut ModuleTree, pattern: &str) -> Result<(), String> {
    let fitting: Vec<u32> = tree.preorder().into_iter().filter(|m| fits(tree, *m, pattern)).collect();
    if fitting.is_empty() {
        const SHOWN: usize = 6;
        let names: Vec<&str> = tree.modules()[1..].iter().map(|m| m.fqn.as_str()).collect();
        let more = if names.len() > SHOWN { ", ..." } else { "" };
        let some = names.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", ");
        return Err(format!("--unit '{pattern}': no module has such a name; the model has {some}{more}"));
    }
    for m in fitting {
        // Another pattern may have chosen it already.
        if !tree.is_wrapped(m) {
            tree.wrap(m).map_err(|e| e.message)?;
        }
    }
    Ok(())
}

fn fits(tree: &ModuleTree, module: u32, pattern: &str) -> bool {
    module != ROOT && matches(pattern, &tree.modules()[module as usize].fqn)
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn one_star_stays_between_dots_and_two_do_not() {
        for (pattern, name, want) in [
            ("layers.*", "layers.12", true),
            ("layers.*", "layers.1.mlp", false),
            ("layers.*.mlp", "layers.1.mlp", true),
            ("**.mlp", "model.layers.1.mlp", true),
            ("**", "a.b", true),
            ("*", "a.b", false),
            ("*", "", true),
            ("", "", true),
            ("a*c", "abbc", true),
            ("a*c", "abcd", false),
            ("layers.1", "layers.12", false),
            ("é*", "éa", true),
        ] {
            assert_eq!(matches(pattern, name), want, "{pattern} {name}");
        }
    }
}
