//! One figure: the quantity measured, its distribution, and its bar.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

/// The unit of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum Unit {
    #[serde(rename = "ns")]
    Nanoseconds,
    #[serde(rename = "ms")]
    Milliseconds,
    #[serde(rename = "MB")]
    Megabytes,
    #[serde(rename = "MiB")]
    Mebibytes,
    #[serde(rename = "MiB/s")]
    MebibytesPerSecond,
    /// Percent of one core.
    #[serde(rename = "%")]
    Percent,
    #[serde(rename = "x")]
    Ratio,
    #[serde(rename = "times")]
    Times,
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nanoseconds => "ns",
            Self::Milliseconds => "ms",
            Self::Megabytes => "MB",
            Self::Mebibytes => "MiB",
            Self::MebibytesPerSecond => "MiB/s",
            Self::Percent => "%",
            Self::Ratio => "x",
            Self::Times => "times",
        })
    }
}

/// The value of a distribution to which a bar applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Of {
    Min,
    P50,
    P99,
    Max,
}

/// A bar: one value of the distribution must stay on one side of a limit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Bar {
    of: Of,
    #[serde(flatten)]
    limit: Limit,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Limit {
    AtMost(f64),
    AtLeast(f64),
}

impl Bar {
    pub(crate) fn at_most(of: Of, limit: f64) -> Self {
        let limit = Limit::AtMost(limit);
        Self { of, limit }
    }

    pub(crate) fn at_least(of: Of, limit: f64) -> Self {
        let limit = Limit::AtLeast(limit);
        Self { of, limit }
    }
}

impl fmt::Display for Bar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = match self.of {
            Of::Min => "min",
            Of::P50 => "p50",
            Of::P99 => "p99",
            Of::Max => "max",
        };
        match self.limit {
            Limit::AtMost(limit) => write!(f, "{of} ≤ {limit}"),
            Limit::AtLeast(limit) => write!(f, "{of} ≥ {limit}"),
        }
    }
}

/// A distribution and its bars.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Figure {
    group: &'static str,
    name: String,
    unit: Unit,
    n: usize,
    min: f64,
    p50: f64,
    p99: f64,
    max: f64,
    bars: Vec<Bar>,
    kept: Option<bool>,
}

impl Figure {
    /// Creates the distribution of `values`, without a bar. The empty distribution keeps no bar.
    pub(crate) fn of(
        group: &'static str,
        name: impl Into<String>,
        unit: Unit,
        mut values: Vec<f64>,
    ) -> Self {
        values.sort_by(f64::total_cmp);
        Self {
            group,
            name: name.into(),
            unit,
            n: values.len(),
            min: quantile(&values, 0),
            p50: quantile(&values, 50),
            p99: quantile(&values, 99),
            max: quantile(&values, 100),
            bars: Vec::new(),
            kept: None,
        }
    }

    /// Like [`Figure::of`], for times in milliseconds.
    pub(crate) fn times(
        group: &'static str,
        name: impl Into<String>,
        values: impl IntoIterator<Item = Duration>,
    ) -> Self {
        let values = values.into_iter().map(milliseconds).collect();
        Self::of(group, name, Unit::Milliseconds, values)
    }

    /// Like [`Figure::of`], for a single value.
    pub(crate) fn single(
        group: &'static str,
        name: impl Into<String>,
        unit: Unit,
        value: f64,
    ) -> Self {
        Self::of(group, name, unit, vec![value])
    }

    /// Adds a bar.
    #[must_use]
    pub(crate) fn bar(mut self, bar: Bar) -> Self {
        let value = match bar.of {
            Of::Min => self.min,
            Of::P50 => self.p50,
            Of::P99 => self.p99,
            Of::Max => self.max,
        };
        // Comparisons with NaN, the quantile of no values, are false.
        let kept = match bar.limit {
            Limit::AtMost(limit) => value <= limit,
            Limit::AtLeast(limit) => value >= limit,
        };
        self.kept = Some(self.kept.unwrap_or(true) && kept);
        self.bars.push(bar);
        self
    }

    /// Returns true if the figure misses a bar.
    pub(crate) fn failed(&self) -> bool {
        self.kept == Some(false)
    }

    pub(crate) fn p50(&self) -> f64 {
        self.p50
    }

    pub(crate) fn p99(&self) -> f64 {
        self.p99
    }

    /// Returns the cells of the figure's row in a table.
    pub(crate) fn cells(&self) -> [String; 10] {
        let bars: Vec<String> = self.bars.iter().map(Bar::to_string).collect();
        let kept = match self.kept {
            None => "-",
            Some(true) => "yes",
            Some(false) => "NO",
        };
        let number = |value: f64| match value.abs() {
            _ if value.fract() == 0.0 => format!("{value:.0}"),
            small if small < 100.0 => format!("{value:.2}"),
            _ => format!("{value:.0}"),
        };
        [
            self.group.to_owned(),
            self.name.clone(),
            self.unit.to_string(),
            self.n.to_string(),
            number(self.min),
            number(self.p50),
            number(self.p99),
            number(self.max),
            bars.join(", "),
            kept.to_owned(),
        ]
    }
}

/// Headings of [`Figure::cells`].
pub(crate) const HEADINGS: [&str; 10] = [
    "group", "what", "unit", "n", "min", "p50", "p99", "max", "bar", "kept",
];

pub(crate) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Returns a quantile of values in any order.
pub(crate) fn quantile_of(values: &[f64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    quantile(&sorted, percent)
}

/// Returns the median of values in any order.
pub(crate) fn median(values: &[f64]) -> f64 {
    quantile_of(values, 50)
}

/// Returns the smallest value such that at least `percent` percent of all values do not exceed it (nearest rank).
fn quantile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let hundred = (1..=100).map(f64::from).collect();
        let figure = Figure::of("g", "f", Unit::Times, hundred);
        assert_eq!((figure.min, figure.p50), (1.0, 50.0));
        assert_eq!((figure.p99, figure.max), (99.0, 100.0));
        let one = Figure::single("g", "f", Unit::Times, 7.0);
        assert_eq!((one.min, one.p99, one.n), (7.0, 7.0, 1));
    }

    #[test]
    fn every_bar_has_to_be_kept_and_nothing_measured_keeps_none() {
        let of = |values| Figure::of("g", "f", Unit::Times, values);
        let both = |figure: Figure| {
            let figure = figure.bar(Bar::at_least(Of::Min, 1.0));
            figure.bar(Bar::at_most(Of::Max, 2.0))
        };
        assert!(!of(vec![9.0]).failed(), "without a bar");
        assert!(!both(of(vec![1.0, 2.0])).failed());
        assert!(both(of(vec![0.5, 2.0])).failed());
        assert!(both(of(vec![1.0, 3.0])).failed());
        assert!(both(of(vec![])).failed());
    }
}
