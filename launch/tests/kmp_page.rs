//! The configuration that `docs/kmp.md` shows for an agent started by hand is one.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use kmorph_launch::{AgentConfig, Listen, Role, StartMode};

#[test]
fn the_agent_configuration_on_the_page_is_one() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/kmp.md");
    let page = std::fs::read_to_string(path).unwrap();
    let at = page.find("```json\n").unwrap() + "```json\n".len();
    let text = page[at..].split("```").next().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("agent.json");
    std::fs::write(&file, text).unwrap();
    let config = AgentConfig::load(&file).unwrap();
    assert_eq!((config.role, config.start), (Role::Child, StartMode::Fresh));
    assert!(matches!(config.listen, Listen::Unix { port: 9000, .. }));
}
