//! The optimizers there are and their options: defaults, limits, and what ranks must agree on.

use crate::error::{err, Result};

/// Stochastic gradient descent, with PyTorch's meaning of every option.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SgdOptions {
    pub lr: f64,
    pub momentum: f64,
    pub dampening: f64,
    pub weight_decay: f64,
    pub nesterov: bool,
    pub maximize: bool,
}

impl Default for SgdOptions {
    fn default() -> SgdOptions {
        SgdOptions { lr: 1e-3, momentum: 0.0, dampening: 0.0, weight_decay: 0.0, nesterov: false, maximize: false }
    }
}

/// Adam with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101), with PyTorch's meaning of every option.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWOptions {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    pub maximize: bool,
}

impl Default for AdamWOptions {
    fn default() -> AdamWOptions {
        AdamWOptions { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 1e-2, maximize: false }
    }
}

/// Which optimizer, with its options.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    Sgd(SgdOptions),
    AdamW(AdamWOptions),
}

/// A number that every option may be: neither negative nor NaN, and finite in float32 too.
pub fn check_size(name: &str, value: f64) -> Result<()> {
    match value >= 0.0 && (value as f32).is_finite() {
        true => Ok(()),
        false => Err(err!(InvalidArgument, "{name} cannot be {value}: a finite number of at least 0 is needed")),
    }
}

fn check_beta(name: &str, value: f64) -> Result<()> {
    // As float32 too: 1 there would keep the averages at their first values.
    match value >= 0.0 && (value as f32) < 1.0 {
        true => Ok(()),
        false => {
            Err(err!(InvalidArgument, "{name} cannot be {value}: a number of at least 0 and less than 1 is needed"))
        }
    }
}

impl Rule {
    /// As checkpoints and messages call it.
    pub fn name(&self) -> &'static str {
        match self {
            Rule::Sgd(_) => "sgd",
            Rule::AdamW(_) => "adamw",
        }
    }

    /// The states that it keeps for each element, by PyTorch's names.
    pub fn states(&self) -> &'static [&'static str] {
        match self {
            Rule::Sgd(o) if o.momentum == 0.0 => &[],
            Rule::Sgd(_) => &["momentum_buffer"],
            Rule::AdamW(_) => &["exp_avg", "exp_avg_sq"],
        }
    }

    pub fn weight_decay(&self) -> f64 {
        match self {
            Rule::Sgd(o) => o.weight_decay,
            Rule::AdamW(o) => o.weight_decay,
        }
    }

    pub fn lr(&self) -> f64 {
        match self {
            Rule::Sgd(o) => o.lr,
            Rule::AdamW(o) => o.lr,
        }
    }

    pub fn set_lr(&mut self, lr: f64) -> Result<()> {
        check_size("lr", lr)?;
        match self {
            Rule::Sgd(o) => o.lr = lr,
            Rule::AdamW(o) => o.lr = lr,
        }
        Ok(())
    }

    /// Refuses options outside their limits, by name.
    pub fn check(&self) -> Result<()> {
        check_size("lr", self.lr())?;
        check_size("weight_decay", self.weight_decay())?;
        match self {
            Rule::Sgd(o) => {
                check_size("momentum", o.momentum)?;
                if !(o.dampening as f32).is_finite() {
                    return Err(err!(
                        InvalidArgument,
                        "dampening cannot be {}: a finite number is needed",
                        o.dampening
                    ));
                }
                if o.nesterov && (o.momentum == 0.0 || o.dampening != 0.0) {
                    return Err(err!(
                        InvalidArgument,
                        "nesterov needs a momentum greater than 0 and no dampening: momentum is {}, dampening {}",
                        o.momentum,
                        o.dampening
                    ));
                }
            }
            Rule::AdamW(o) => {
                check_beta("beta1", o.beta1)?;
                check_beta("beta2", o.beta2)?;
                check_size("eps", o.eps)?;
            }
        }
        Ok(())
    }

    /// "name = value" of every option; ranks must have the same.
    pub fn agreed(&self) -> Vec<String> {
        let option = |(name, value): (&str, String)| format!("{name} = {value}");
        let number = |name, value: f64| (name, format!("{value:?}"));
        let flag = |name, value: bool| (name, value.to_string());
        let mut lines = vec![("optimizer", self.name().to_string())];
        match self {
            Rule::Sgd(o) => lines.extend([
                number("lr", o.lr),
                number("momentum", o.momentum),
                number("dampening", o.dampening),
                number("weight_decay", o.weight_decay),
                flag("nesterov", o.nesterov),
                flag("maximize", o.maximize),
            ]),
            Rule::AdamW(o) => lines.extend([
                number("lr", o.lr),
                number("beta1", o.beta1),
                number("beta2", o.beta2),
                number("eps", o.eps),
                number("weight_decay", o.weight_decay),
                flag("maximize", o.maximize),
            ]),
        }
        lines.into_iter().map(option).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(rule: Rule) -> String {
        rule.check().unwrap_err().message
    }

    #[test]
    fn defaults_and_limits_are_allowed() {
        Rule::Sgd(SgdOptions::default()).check().unwrap();
        Rule::AdamW(AdamWOptions::default()).check().unwrap();
        let zero = AdamWOptions { lr: 0.0, beta1: 0.0, beta2: 0.0, eps: 0.0, weight_decay: 0.0, maximize: true };
        Rule::AdamW(zero).check().unwrap();
        Rule::Sgd(SgdOptions { momentum: 2.0, dampening: -0.5, ..Default::default() }).check().unwrap();
        Rule::Sgd(SgdOptions { momentum: 0.9, nesterov: true, ..Default::default() }).check().unwrap();
    }

    #[test]
    fn bad_values_are_named() {
        for bad in [-1.0, -1e-300, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e39] {
            let sgd = SgdOptions::default();
            assert!(refused(Rule::Sgd(SgdOptions { lr: bad, ..sgd })).contains("lr cannot be"), "{bad}");
            assert!(refused(Rule::Sgd(SgdOptions { momentum: bad, ..sgd })).contains("momentum cannot be"), "{bad}");
            assert!(refused(Rule::Sgd(SgdOptions { weight_decay: bad, ..sgd })).contains("weight_decay"), "{bad}");
            let adamw = AdamWOptions::default();
            assert!(refused(Rule::AdamW(AdamWOptions { lr: bad, ..adamw })).contains("lr cannot be"), "{bad}");
            assert!(refused(Rule::AdamW(AdamWOptions { eps: bad, ..adamw })).contains("eps cannot be"), "{bad}");
            assert!(
                refused(Rule::AdamW(AdamWOptions { weight_decay: bad, ..adamw })).contains("weight_decay"),
                "{bad}"
            );
            assert!(refused(Rule::AdamW(AdamWOptions { beta1: bad, ..adamw })).contains("beta1 cannot be"), "{bad}");
            assert!(refused(Rule::AdamW(AdamWOptions { beta2: bad, ..adamw })).contains("beta2 cannot be"), "{bad}");
            assert!(Rule::AdamW(adamw).set_lr(bad).is_err(), "{bad}");
        }
        for bad in [1.0, 1.0 - 1e-12] {
            assert!(refused(Rule::AdamW(AdamWOptions { beta2: bad, ..Default::default() })).contains("beta2"), "{bad}");
        }
        assert!(refused(Rule::Sgd(SgdOptions { dampening: f64::NAN, ..Default::default() })).contains("dampening"));
        let nesterov = SgdOptions { nesterov: true, ..Default::default() };
        assert!(refused(Rule::Sgd(nesterov)).contains("nesterov"));
        let dampened = SgdOptions { momentum: 0.5, dampening: 0.1, ..nesterov };
        assert!(refused(Rule::Sgd(dampened)).contains("nesterov"));
    }

    #[test]
    fn every_option_is_agreed_on() {
        let lines = Rule::Sgd(SgdOptions { momentum: 0.1, ..Default::default() }).agreed();
        assert_eq!(lines.len(), 7);
        assert!(lines.contains(&"momentum = 0.1".to_string()), "{lines:?}");
        let adamw = AdamWOptions { beta2: 0.95, maximize: true, ..Default::default() };
        let lines = Rule::AdamW(adamw).agreed();
        assert_eq!(lines.len(), 7);
        assert!(lines.contains(&"maximize = true".to_string()), "{lines:?}");
    }
}
