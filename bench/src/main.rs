//! Measures kmorph and prints a table; exits with 1 when a bar is not kept. Run it in release, on a
//! quiet machine.

mod wire;

use comfy_table::{ContentArrangement, Table, presets};

fn main() -> std::process::ExitCode {
    let measurements = wire::run();
    let mut table = Table::new();
    table
        .load_style(presets::ASCII_MARKDOWN)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(["what", "measured", "unit", "bar", "kept"]);
    for m in &measurements {
        let bar = m.bar.map_or_else(|| "-".to_owned(), |bar| format!("{bar}"));
        let kept = if m.passes() { "yes" } else { "NO" };
        table.add_row([m.name, &format!("{:.1}", m.value), m.unit, &bar, kept]);
    }
    println!("{table}");
    let failed = measurements.iter().any(|m| !m.passes());
    std::process::ExitCode::from(u8::from(failed))
}
