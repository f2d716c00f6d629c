//! What clients see: exact bytes, limits, and the real redis tools.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::process::Command;

use kmorph_workload::handover::message::Role;
use support::{Client, Server, listener};

#[test]
fn replies_are_exact() {
    let (socket, address) = listener();
    let _server = Server::start(&socket, Role::Serve, &[]);
    let mut client = Client::connect(address);
    for (command, reply) in [
        ("PING", "+PONG\r\n"),
        ("ping hello", "$5\r\nhello\r\n"),
        ("ECHO x", "$1\r\nx\r\n"),
        ("GET none", "$-1\r\n"),
        ("SET k v", "+OK\r\n"),
        ("GET k", "$1\r\nv\r\n"),
        ("SET k w NX", "$-1\r\n"),
        ("SET k w XX GET", "$1\r\nv\r\n"),
        ("SET n w XX", "$-1\r\n"),
        (
            "SET k v EX 0",
            "-ERR invalid expire time in 'set' command\r\n",
        ),
        (
            "SET k v EX x",
            "-ERR value is not an integer or out of range\r\n",
        ),
        ("SET k v NX XX", "-ERR syntax error\r\n"),
        ("SET k v EX 5 PX 5", "-ERR syntax error\r\n"),
        ("SET k v EX 100", "+OK\r\n"),
        ("TTL k", ":100\r\n"),
        ("SET k v KEEPTTL", "+OK\r\n"),
        ("TTL k", ":100\r\n"),
        ("PERSIST k", ":1\r\n"),
        ("PERSIST k", ":0\r\n"),
        ("TTL k", ":-1\r\n"),
        ("PTTL none", ":-2\r\n"),
        ("EXPIRE k 50", ":1\r\n"),
        ("EXPIRE none 50", ":0\r\n"),
        ("TTL k", ":50\r\n"),
        ("EXPIRE k -1", ":1\r\n"),
        ("EXISTS k", ":0\r\n"),
        ("SETEX s 20 v", "+OK\r\n"),
        ("TTL s", ":20\r\n"),
        ("INCR c", ":1\r\n"),
        ("INCRBY c 41", ":42\r\n"),
        ("DECR c", ":41\r\n"),
        ("DECRBY c 1", ":40\r\n"),
        ("APPEND c 0", ":3\r\n"),
        ("STRLEN c", ":3\r\n"),
        ("INCR s", "-ERR value is not an integer or out of range\r\n"),
        ("SET max 9223372036854775807", "+OK\r\n"),
        ("INCR max", "-ERR increment or decrement would overflow\r\n"),
        ("MSET a 1 b 2", "+OK\r\n"),
        (
            "MSET a 1 b",
            "-ERR wrong number of arguments for 'mset' command\r\n",
        ),
        ("MGET a z b", "*3\r\n$1\r\n1\r\n$-1\r\n$1\r\n2\r\n"),
        ("EXISTS a a b z", ":3\r\n"),
        ("DEL a z b", ":2\r\n"),
        ("TYPE c", "+string\r\n"),
        ("TYPE z", "+none\r\n"),
        ("DBSIZE", ":3\r\n"),
        ("KEYS ma*", "*1\r\n$3\r\nmax\r\n"),
        (
            "SCAN 0 COUNT 1000 MATCH max",
            "*2\r\n$1\r\n0\r\n*1\r\n$3\r\nmax\r\n",
        ),
        ("SCAN x", "-ERR invalid cursor\r\n"),
        ("SCAN 0 COUNT", "-ERR syntax error\r\n"),
        (
            "GET",
            "-ERR wrong number of arguments for 'get' command\r\n",
        ),
        ("LPUSH l 1", "-ERR unknown command 'LPUSH'\r\n"),
        ("SELECT 0", "+OK\r\n"),
        ("SELECT 1", "-ERR DB index is out of range\r\n"),
        ("HELLO 3", "-NOPROTO unsupported protocol version\r\n"),
        ("CLIENT SETNAME me", "+OK\r\n"),
        ("CLIENT GETNAME", "$2\r\nme\r\n"),
        ("CONFIG GET save", "*2\r\n$4\r\nsave\r\n$0\r\n\r\n"),
        ("FLUSHALL", "+OK\r\n"),
        ("DBSIZE", ":0\r\n"),
    ] {
        client.write(format!("{command}\r\n").as_bytes());
        client.expect(reply.as_bytes());
    }
    client.write(b"PING\r\nQUIT\r\nPING\r\n");
    client.expect(b"+PONG\r\n+OK\r\n");
    client.expect_end();
}

#[test]
fn a_client_that_speaks_no_resp_is_told_and_closed() {
    let (socket, address) = listener();
    let _server = Server::start(&socket, Role::Serve, &["--max-bulk=1kb"]);
    for (bytes, reply) in [
        (
            &b"*1\r\n:1\r\n"[..],
            "-ERR Protocol error: expected '$', got ':'\r\n",
        ),
        (
            b"*2\r\n$3\r\nGET\r\n$1025\r\n",
            "-ERR Protocol error: invalid bulk length\r\n",
        ),
        (
            b"*9999999\r\n",
            "-ERR Protocol error: invalid multibulk length\r\n",
        ),
    ] {
        let mut client = Client::connect(address);
        client.write(bytes);
        client.expect(reply.as_bytes());
        client.expect_end();
    }
}

#[test]
fn a_full_memory_refuses_writes_and_still_answers() {
    let (socket, address) = listener();
    let _server = Server::start(&socket, Role::Serve, &["--max-memory=1mb"]);
    let mut client = Client::connect(address);
    let value = "x".repeat(10_000);
    let refused = (0..200)
        .map(|n| client.ask(&format!("SET k{n} {value}")))
        .find(|reply| reply != "+OK");
    let oom = "-OOM command not allowed when used memory > 'maxmemory'.";
    assert_eq!(refused.as_deref(), Some(oom));
    assert_eq!(client.ask("STRLEN k0"), ":10000");
    assert_eq!(client.ask("DEL k0 k1"), ":2");
    assert_eq!(client.ask(&format!("SET k0 {value}")), "+OK");
}

/// It is read and dropped: the connection, the data and the server are what they were.
#[test]
fn a_command_that_the_memory_has_no_room_for_is_answered_oom() {
    let (socket, address) = listener();
    let _server = Server::start_with_memory(&socket, Role::Serve, &[], 16 << 20);
    let mut client = Client::connect(address);
    assert_eq!(client.ask("SET k v"), "+OK");
    let value = "x".repeat(20_000_000);
    let large = format!(
        "*3\r\n$3\r\nSET\r\n$1\r\nk\r\n${}\r\n{value}\r\n",
        value.len()
    );
    let refused = client.ask(large.trim_end());
    assert!(refused.starts_with("-OOM "), "{refused}");
    assert_eq!(client.ask("STRLEN k"), ":1");
}

#[test]
fn clients_over_the_limit_are_told() {
    let (socket, address) = listener();
    let _server = Server::start(&socket, Role::Serve, &["--max-clients=2"]);
    let mut first = Client::connect(address);
    let mut second = Client::connect(address);
    assert_eq!(first.ask("PING"), "+PONG");
    assert_eq!(second.ask("PING"), "+PONG");
    let mut third = Client::connect(address);
    assert_eq!(third.line(), "-ERR max number of clients reached");
    third.expect_end();
    assert_eq!(first.ask("PING"), "+PONG");
}

#[test]
fn an_expired_key_is_gone_and_its_memory_with_it() {
    let (socket, address) = listener();
    let _server = Server::start(&socket, Role::Serve, &[]);
    let mut client = Client::connect(address);
    assert_eq!(client.ask("SET k v PX 30"), "+OK");
    let begin = std::time::Instant::now();
    while client.ask("DBSIZE") != ":0" {
        assert!(begin.elapsed() < support::DEADLINE);
    }
    assert!(begin.elapsed().as_millis() >= 29);
    assert_eq!(client.ask("EXISTS k"), ":0");
}

/// Runs a redis tool against the server and returns what it printed.
fn tool(program: &str, port: u16, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(["-h", "127.0.0.1", "-p", &port.to_string()])
        .args(args)
        .output()
        .unwrap_or_else(|error| {
            panic!("running {program}: {error}; install it (Debian: redis-tools)")
        });
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{program} {args:?}: {text}{errors}"
    );
    text
}

#[test]
fn redis_cli_and_redis_benchmark_are_content() {
    if std::env::var_os("KMORPH_TEST_WITHOUT_REDIS_TOOLS").is_some() {
        eprintln!("not run: KMORPH_TEST_WITHOUT_REDIS_TOOLS is set");
        return;
    }
    let (socket, address) = listener();
    let _server = Server::start(&socket, Role::Serve, &[]);
    let port = address.port();
    assert_eq!(tool("redis-cli", port, &["SET", "k", "a value"]), "OK\n");
    assert_eq!(tool("redis-cli", port, &["GET", "k"]), "a value\n");
    assert_eq!(tool("redis-cli", port, &["--scan"]), "k\n");
    let info = tool("redis-cli", port, &["INFO"]);
    assert!(info.contains("kmorph_generation:7"), "{info}");
    let args = [
        "-q",
        "-n",
        "2000",
        "-c",
        "20",
        "-P",
        "4",
        "-t",
        "ping,set,get,incr,mset",
    ];
    let report = tool("redis-benchmark", port, &args);
    for test in ["PING_INLINE", "SET", "GET", "INCR", "MSET"] {
        assert!(report.contains(test), "{report}");
    }
    assert!(report.contains("requests per second"), "{report}");
    assert!(!report.to_lowercase().contains("error"), "{report}");
}
