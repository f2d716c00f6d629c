//! `docs/kmp-rules.md` against `docs/kmp.md` and the tests: each rule quotes the page verbatim, each test that proves a
//! rule exists, and no normative sentence is missing.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::PathBuf;

/// Words that make a statement of `docs/kmp.md` normative: the statement demands, forbids or bounds something.
const NORMATIVE: &[&str] = &[
    "must",
    "never",
    "always",
    "only",
    "exactly",
    "alone",
    "no other",
    "at most",
    "at least",
    "mandatory",
    "malformed",
    "refuse",
    "refuses",
    "refused",
    "error",
    "close",
    "closes",
    "closed",
    "ends the",
    "ends it",
    "end the",
    "ignored",
    "ignores",
    "skipped",
    "dropped",
    "check",
    "checked",
    "checks",
    "within",
    "critical",
    "once",
    "reserved",
    "unused",
    "cannot",
    "repeats",
    "takes the place",
    "gives way",
];
/// Maximum length of a quotation, characters: a quotation locates a rule, and does not repeat the page.
const QUOTATION_MAX: usize = 110;
/// Sections of `docs/kmp.md` that only illustrate the rules of other sections.
const WITHOUT_RULES: &[&str] = &["Examples"];
/// Sections of `docs/kmp-rules.md` whose tables name the section of each quotation, with a reason in place of tests.
const REASONED: &[&str] = &["Not testable", "Explanations"];

/// A sentence, a row of a table, or a block of code.
struct Statement {
    at: Range<usize>,
    /// For a row of a table, the index of the statement that is the head of the table.
    head: Option<usize>,
    code: bool,
}

/// A section of a page, with white space and the borders of table cells reduced to single blanks.
#[derive(Default)]
struct Section {
    name: String,
    text: String,
    statements: Vec<Statement>,
}

impl Section {
    fn push(&mut self, text: &str, head: Option<usize>, code: bool) {
        let words = normal(text);
        if !words.is_empty() {
            let start = self.text.len();
            self.text = self.text.clone() + &words + " ";
            let at = start..start + words.len();
            self.statements.push(Statement { at, head, code });
        }
    }

    /// Adds a paragraph, sentence by sentence.
    fn push_sentences(&mut self, paragraph: &mut String) {
        let mut sentence = String::new();
        for word in paragraph.split_whitespace() {
            sentence = sentence + word + " ";
            if word
                .trim_end_matches(['*', ')', '`', '"'])
                .ends_with(['.', '?'])
            {
                self.push(&sentence, None, false);
                sentence.clear();
            }
        }
        self.push(&sentence, None, false);
        paragraph.clear();
    }

    /// Returns the place of a quotation; `None` unless the quotation occurs exactly once.
    fn find(&self, quotation: &str) -> Option<Range<usize>> {
        let quotation = normal(quotation);
        let mut found = self.text.match_indices(&quotation);
        let at = found.next()?.0;
        found.next().is_none().then_some(at..at + quotation.len())
    }

    /// Returns the statements that none of these places quotes, although they are normative or belong to a table with a
    /// quoted row. A quotation of the head of a table covers all of its rows; the head itself only names columns.
    fn left_out(&self, places: &[Range<usize>]) -> Vec<&str> {
        let overlaps =
            |at: &Range<usize>| places.iter().any(|p| p.start < at.end && at.start < p.end);
        let quoted: Vec<_> = self.statements.iter().map(|s| overlaps(&s.at)).collect();
        let heads: BTreeSet<_> = self.statements.iter().filter_map(|s| s.head).collect();
        let begun =
            |head| (0..quoted.len()).any(|n| quoted[n] && self.statements[n].head == Some(head));
        let mut left_out = Vec::new();
        for (n, statement) in self.statements.iter().enumerate() {
            let text = &self.text[statement.at.clone()];
            let with_head = statement.head.is_some_and(|head| quoted[head]);
            let known = quoted[n] || with_head || heads.contains(&n) || statement.code;
            if !known && (demands(text) || statement.head.is_some_and(begun)) {
                left_out.push(text);
            }
        }
        left_out
    }
}

fn normal(text: &str) -> String {
    let words: Vec<_> = text
        .split(|c: char| c.is_whitespace() || c == '|')
        .collect();
    words
        .into_iter()
        .filter(|w| !w.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

fn demands(text: &str) -> bool {
    let words: Vec<_> = text
        .split(|c: char| !c.is_alphanumeric())
        .filter(|w| !w.is_empty())
        .collect();
    let text = format!(" {} ", words.join(" ").to_lowercase());
    NORMATIVE
        .iter()
        .any(|word| text.contains(&format!(" {word} ")))
}

/// Returns the sections of a page; the text of each heading excludes the text of its subheadings.
fn sections(page: &str) -> Vec<Section> {
    let mut all = vec![Section::default()];
    let (mut paragraph, mut code, mut head) = (String::new(), None::<String>, None);
    for line in page.lines().chain([""]) {
        let section = all.last_mut().unwrap();
        if let Some(mut block) = code.take() {
            if line.starts_with("```") {
                section.push(&block, None, true);
            } else {
                block = block + line + "\n";
                code = Some(block);
            }
            continue;
        }
        let row = line.strip_prefix('|');
        let marks = ["#", "* ", "```"];
        let breaks = line.is_empty() || marks.iter().any(|mark| line.starts_with(mark));
        if row.is_some() || breaks {
            section.push_sentences(&mut paragraph);
        }
        match row {
            Some(row) if row.starts_with("---") => head = Some(section.statements.len() - 1),
            Some(row) => section.push(row, head, false),
            None => head = None,
        }
        if line.starts_with("```") {
            code = Some(String::new());
        } else if line.starts_with('#') {
            let name = line.trim_start_matches('#').trim().to_owned();
            all.push(Section {
                name,
                ..Section::default()
            });
        } else if row.is_none() {
            paragraph = paragraph + line.strip_prefix("* ").unwrap_or(line) + "\n";
        }
    }
    all
}

/// A row of `docs/kmp-rules.md`: the quotation, its section, and the tests that prove the rule.
struct Rule {
    section: String,
    quotation: String,
    tests: Vec<String>,
}

fn rules(page: &str) -> Vec<Rule> {
    let (mut rules, mut section) = (Vec::new(), "");
    for line in page.lines() {
        section = line.strip_prefix("## ").unwrap_or(section);
        let Some(row) = line
            .strip_prefix("| ")
            .and_then(|row| row.strip_suffix(" |"))
        else {
            continue;
        };
        let cells: Vec<_> = row.split(" | ").collect();
        let reasoned = REASONED.contains(&section);
        let (([_, quotation, _], true) | ([quotation, _], false)) = (&cells[..], reasoned) else {
            panic!("another number of cells: {line}");
        };
        let tests = cells[1].split('`').filter(|part| part.contains("::"));
        rules.push(Rule {
            section: if reasoned { cells[0] } else { section }.to_owned(),
            quotation: (*quotation).to_owned(),
            tests: if reasoned {
                Vec::new()
            } else {
                tests.map(str::to_owned).collect()
            },
        });
    }
    rules.retain(|rule| !["rule", "sentence"].contains(&rule.quotation.as_str()));
    rules
}

/// Returns true if `source` has a test of this name that runs.
fn has_test(source: &str, name: &str) -> bool {
    let lines: Vec<_> = source.lines().map(str::trim_start).collect();
    let is_it = |line: &&str| {
        let line = line.strip_prefix("async ").unwrap_or(line);
        line.strip_prefix("fn ")
            .is_some_and(|line| line.starts_with(&format!("{name}(")))
    };
    let Some(at) = lines.iter().position(is_it) else {
        return false;
    };
    let attributes = lines[..at]
        .iter()
        .rev()
        .take_while(|line| line.starts_with(['#', '/']));
    let tests = ["#[test]", "#[tokio::test", "#[actix::test"];
    let of_test = |line: &&str| tests.iter().any(|test| line.starts_with(test));
    attributes.clone().any(of_test) && !attributes.clone().any(|line| line.starts_with("#[ignore"))
}

/// Returns the faults of a row; `read` returns the text of a source file.
fn faults_of(
    rule: &Rule,
    sections: &[Section],
    read: &dyn Fn(&str) -> Option<String>,
) -> Vec<String> {
    let mut faults = Vec::new();
    let (name, quotation) = (&rule.section, &rule.quotation);
    let section = sections.iter().find(|section| section.name == *name);
    if section
        .and_then(|section| section.find(quotation))
        .is_none()
    {
        faults.push(format!(
            "does not stand exactly once in {name:?}: {quotation}"
        ));
    }
    if quotation.chars().count() > QUOTATION_MAX {
        faults.push(format!(
            "longer than {QUOTATION_MAX} characters: {quotation}"
        ));
    }
    for test in &rule.tests {
        let (file, path) = test.split_once("::").unwrap();
        let function = path.rsplit("::").next().unwrap();
        if !read(file).is_some_and(|source| has_test(&source, function)) {
            faults.push(format!("no test: {test}"));
        }
    }
    faults
}

/// Returns all faults of `index`, the text of `docs/kmp-rules.md`, for this page.
fn faults(page: &str, index: &str, read: &dyn Fn(&str) -> Option<String>) -> Vec<String> {
    let (sections, rules) = (sections(page), rules(index));
    let mut faults: Vec<_> = rules
        .iter()
        .flat_map(|rule| faults_of(rule, &sections, read))
        .collect();
    for section in &sections {
        let name = &section.name;
        if WITHOUT_RULES.contains(&name.as_str()) || section.text.is_empty() {
            continue;
        }
        let of_it: Vec<_> = rules.iter().filter(|rule| rule.section == *name).collect();
        if of_it.is_empty() {
            faults.push(format!("no row for the section {name:?}"));
        }
        let places = of_it
            .iter()
            .filter_map(|rule| section.find(&rule.quotation));
        let left_out = section.left_out(&places.collect::<Vec<_>>());
        faults.extend(
            left_out
                .iter()
                .map(|text| format!("not quoted, in {name:?}: {text}")),
        );
    }
    faults
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(root().join(path)).ok()
}

fn pages() -> (String, String) {
    (
        read("docs/kmp.md").unwrap(),
        read("docs/kmp-rules.md").unwrap(),
    )
}

#[test]
fn every_rule_of_the_page_has_a_test_or_a_reason_why_not() {
    let (page, index) = pages();
    let faults = faults(&page, &index, &read);
    assert!(
        faults.is_empty(),
        "docs/kmp-rules.md:\n{}",
        faults.join("\n")
    );
}

#[test]
fn every_row_has_tests_but_those_with_a_reason() {
    let (_, index) = pages();
    for name in REASONED {
        assert!(index.contains(&format!("\n## {name}\n")), "{name}");
    }
    let (tested, _) = index.split_once("\n## Not testable\n").unwrap();
    for rule in rules(tested) {
        assert!(
            !rule.tests.is_empty(),
            "{}: {}",
            rule.section,
            rule.quotation
        );
    }
}

/// Each kind of fault makes this check itself fail.
#[test]
fn a_row_that_is_missing_a_quotation_that_is_wrong_and_a_test_that_is_gone_are_found() {
    let (page, index) = pages();
    let with =
        |index: &str, read: &dyn Fn(&str) -> Option<String>| faults(&page, index, read).len();
    let row = index
        .lines()
        .find(|line| line.starts_with("| 3. version is 1 "))
        .unwrap();
    assert!(with(&index.replace(row, ""), &read) > 0, "a row is deleted");
    assert!(
        with(&index.replace("3. version is 1", "3. version is 2"), &read) > 0,
        "a quotation is changed"
    );
    let name = "the_checks_come_in_their_order_each_with_its_own_error";
    let renamed = |path: &str| read(path).map(|source| source.replace(name, "another_name"));
    assert!(with(&index, &renamed) > 0, "a test is renamed");
    let unmarked = |path: &str| read(path).map(|source| source.replace("#[test]\n", "\n"));
    assert!(with(&index, &unmarked) > 0, "a test is none any more");
    let demand = page.replace(
        "## Examples\n",
        "## Examples\n\n## More\n\nA peer must sing.\n",
    );
    assert!(
        !faults(&demand, &index, &read).is_empty(),
        "a rule is added"
    );
}
