//! The API's description is true: it is what OpenAPI's own schema asks for, every route is in it, everything in it answers,
//! and what is answered is as described.

use std::process::Command;

use serde_json::{Value, json};

use super::harness::{Daemon, JSON, fed};

/// Rules of the linter that do not hold here. Every operation describes its errors, all of them as `default`, for none has some that
/// others do not have. And on the unix socket localhost is what the API is called.
const NOT_HELD_TO: [&str; 2] = ["operation-4xx-response", "no-server-example.com"];

/// OpenAPI 3.1 as a JSON Schema, by the OpenAPI Initiative (Apache-2.0): <https://spec.openapis.org/oas/3.1/schema/2022-10-07>.
const OPENAPI: &str = include_str!("openapi-3.1.schema.json");

/// Validates the description against OpenAPI's schema, each schema in it against JSON Schema's, and finds each reference.
const CHECK_DESCRIPTION: &str = r##"
import json, sys
from jsonschema import Draft202012Validator
given = json.load(sys.stdin)
description = given["description"]
wrong = [f"{error.json_path}: {error.message}" for error in Draft202012Validator(given["openapi"]).iter_errors(description)]
for name, schema in description["components"]["schemas"].items():
    Draft202012Validator.check_schema(schema)
def look(value):
    if isinstance(value, list): return [look(one) for one in value]
    if not isinstance(value, dict): return
    found = description
    for step in str(value.get("$ref", "#")).split("/")[1:]: found = found.get(step, {})
    if not found: wrong.append("nothing is at " + value["$ref"])
    [look(one) for one in value.values()]
look(description)
if wrong: sys.exit("\n".join(wrong))
"##;

/// Validates each answer against the schema that the description has for it.
const CHECK: &str = r##"
import json, sys
from jsonschema import Draft202012Validator
given = json.load(sys.stdin)
for what, schema, answer in given["answers"]:
    schema = dict(schema, components=given["description"]["components"])
    Draft202012Validator.check_schema(schema)
    wrong = [f"{what}: {error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(answer)]
    if wrong: sys.exit("\n".join(wrong))
"##;

/// Runs Debian's Python, which scripts/install gives the package jsonschema. Panics with what it says unless it is content.
fn python(program: &str, input: &Value) {
    let mut command = Command::new("/usr/bin/python3");
    let output = fed(command.args(["-c", program]), &input.to_string());
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn operations(description: &Value) -> Vec<(String, String, Value)> {
    let mut all = Vec::new();
    for (path, item) in description["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            all.push((method.to_uppercase(), path.clone(), operation.clone()));
        }
    }
    assert!(all.len() >= 12, "{all:?}");
    all
}

#[test]
fn it_is_what_openapi_asks_for() {
    let daemon = Daemon::start("validator");
    let description = daemon.get("/v1/openapi.json").json();
    assert_eq!(description["openapi"], "3.1.0");
    let openapi: Value = serde_json::from_str(OPENAPI).unwrap();
    let given = json!({ "openapi": openapi, "description": description });
    python(CHECK_DESCRIPTION, &given);
}

/// Redocly's linter has nothing to say by the rules that it recommends.
#[test]
fn a_public_linter_has_nothing_to_say() {
    if Command::new("redocly").arg("--version").output().is_err() {
        println!("SKIPPED: there is no redocly to lint the API's description");
        return;
    }
    let daemon = Daemon::start("linter");
    let description = daemon.get("/v1/openapi.json").body;
    let lint = |name: &str, text: &str| {
        let file = daemon.dir.join(name);
        std::fs::write(&file, text).unwrap();
        let mut command = Command::new("redocly");
        // It would ask the network whether there is a newer one, and tell its makers how it is used.
        command
            .env("REDOCLY_SUPPRESS_UPDATE_NOTICE", "true")
            .env("REDOCLY_TELEMETRY", "off")
            .current_dir(&daemon.dir);
        let words = ["lint", name, "--extends=recommended", "--format=json"];
        let skipped = NOT_HELD_TO.map(|rule| format!("--skip-rule={rule}"));
        let output = fed(command.args(words).args(skipped), "");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let said: Value =
            serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {output:?}"));
        (output.status.success(), said)
    };
    let (passed, said) = lint("good.json", &description);
    assert_eq!(said["problems"], json!([]));
    assert!(passed, "{said}");
    let without = description.replacen("\"summary\"", "\"x-summary\"", 1);
    let (passed, said) = lint("bad.json", &without);
    assert!(!passed, "{said}");
    assert_eq!(said["problems"][0]["ruleId"], "operation-summary", "{said}");
}

#[test]
#[should_panic(expected = "nothing is at")]
fn a_reference_to_nothing_is_noticed() {
    let description = json!({
        "openapi": "3.1.0",
        "info": { "title": "wrong", "version": "1" },
        "components": { "schemas": { "A": { "$ref": "#/components/schemas/B" } } }
    });
    let openapi: Value = serde_json::from_str(OPENAPI).unwrap();
    let given = json!({ "openapi": openapi, "description": description });
    python(CHECK_DESCRIPTION, &given);
}

#[test]
fn everything_described_answers_and_everything_has_words() {
    let daemon = Daemon::start("described");
    let description = daemon.get("/v1/openapi.json").json();
    let mut ids = std::collections::BTreeSet::new();
    for (method, path, operation) in operations(&description) {
        let id = operation["operationId"].as_str().unwrap().to_owned();
        assert!(ids.insert(id), "{method} {path}: its id is another's");
        let responses = operation["responses"].as_object().unwrap();
        let empty = |response: &&Value| {
            response["description"]
                .as_str()
                .unwrap_or_default()
                .is_empty()
        };
        assert_eq!(responses.values().find(empty), None, "{method} {path}");
        if operation["x-endless"] == true {
            continue;
        }
        let real = path
            .replace("{id}", "6f7ab5a5-4b92-4d6d-93a9-8c2ed2cf1a3e")
            .replace("{vm}", "web");
        let answer = daemon.ask(&method, &real, &[JSON], "{}");
        if answer.status >= 400 {
            let kind = answer.json()["type"].clone();
            assert!(
                responses.contains_key("default"),
                "{method} {path}: {answer:?}"
            );
            for absent in ["no-such-route", "wrong-method"] {
                assert_ne!(
                    kind,
                    format!("urn:problem-type:pagecopy:{absent}"),
                    "{method} {path}"
                );
            }
        } else {
            assert!(
                responses.contains_key(&answer.status.to_string()),
                "{method} {path}: {answer:?}"
            );
        }
    }
}

/// A route that is added in another way than with its description would be missing in it.
#[test]
fn every_route_is_added_with_its_description() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/api");
    let mut seen = 0;
    for file in std::fs::read_dir(folder).unwrap().flatten() {
        let text = std::fs::read_to_string(file.path()).unwrap();
        seen += text.matches("routes!(").count();
        for (number, line) in text.lines().enumerate() {
            let added = [".route(", ".route_service(", ".nest("]
                .iter()
                .any(|word| line.contains(word));
            assert!(
                !added,
                "{}:{}: use routes!",
                file.path().display(),
                number + 1
            );
        }
    }
    assert!(seen >= 10, "only {seen} routes found");
}

#[test]
fn answers_are_as_described() {
    let daemon = Daemon::start("answers");
    let begun = daemon.begin_in_vain("web");
    assert_eq!(begun.status, 201, "{begun:?}");
    let id = begun.json()["id"].as_str().unwrap().to_owned();
    // Up to its end.
    let events = daemon.get(&format!("/v1/migrations/{id}/events"));
    let schema = |name: &str| json!({ "$ref": format!("#/components/schemas/{name}") });
    let list = json!({ "type": "array", "items": schema("Shown"), "minItems": 1 });
    let mut answers = vec![
        json!(["begun", schema("Begun"), begun.json()]),
        json!([
            "shown",
            schema("Shown"),
            daemon.get(&format!("/v1/migrations/{id}")).json()
        ]),
        json!(["list", list, daemon.get("/v1/migrations").json()]),
        json!([
            "problem",
            schema("Problem"),
            daemon.post("/v1/receivers", "[]").json()
        ]),
    ];
    let data = events
        .body
        .lines()
        .filter_map(|line| line.strip_prefix("data: "));
    let data: Vec<Value> = data
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(data.last().unwrap()["event"] == "finished", "{data:?}");
    answers.extend(
        data.into_iter()
            .map(|event| json!(["event", schema("Told"), event])),
    );
    let description = daemon.get("/v1/openapi.json").json();
    let given = json!({ "description": description, "answers": answers });
    python(CHECK, &given);
}
