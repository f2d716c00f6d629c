//! Code that commits unvalidated, reclaims unfenced, or forges, copies or reuses a proof does not compile.

#[test]
fn misuse_does_not_compile() {
    trybuild::TestCases::new().compile_fail("tests/compile-fail/*.rs");
}
