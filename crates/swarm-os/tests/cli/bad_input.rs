//! Everything a user can get wrong: an exit code, one line that says what to do, no panic, no half output.

use std::fs;
use std::net::TcpListener;

use swarm_testkit::toy::{GgufType, spec};

use crate::common::{Bench, SOON};

#[test]
fn files_that_are_no_model() {
    let bench = Bench::new();
    let good = bench.path("good.gguf");
    spec("llama").write_gguf(&good, GgufType::Q8_0).unwrap();
    let bytes = fs::read(&good).unwrap();
    let write = |name: &str, bytes: &[u8]| {
        fs::write(bench.path(name), bytes).unwrap();
        bench.path(name).to_str().unwrap().to_owned()
    };
    let run = |model: &str, texts: &[&str]| {
        bench.refused(&["run", "--model", model, "hi"], 2, texts);
        // Told before workers are started, who would say the same each.
        let finished = bench.run(&["run", "--nodes", "2", "--model", model, "hi"]);
        assert_eq!((finished.status.code(), finished.stderr.lines().count()), (Some(2), 1), "{finished:?}");
    };
    run("/nowhere/model.gguf", &["/nowhere/model.gguf", "there is no file"]);
    run(&write("short.gguf", &bytes[..bytes.len() / 2]), &["short.gguf", "outside the file"]);
    run(&write("header.gguf", &bytes[..40]), &["header.gguf", "cannot hold"]);
    run(&write("magic.gguf", &[b"GGUX", &bytes[4..]].concat()), &["magic.gguf", "GGUX"]);
    let mut version = bytes.clone();
    version[4] = 99;
    run(&write("version.gguf", &version), &["version.gguf", "99"]);
    let folder = bench.toy();
    fs::remove_file(folder.join("model.safetensors")).unwrap();
    run(folder.to_str().unwrap(), &["toy"]);
    run("no-such-name", &["no-such-name", "cargo xtask fetch"]);
    run("nobody/nothing", &["nobody/nothing", "cargo xtask fetch"]);
}

#[test]
fn models_that_cannot_do_what_is_asked() {
    let bench = Bench::new();
    let toy = bench.toy();
    let model = toy.to_str().unwrap();
    let long = "the hen ".repeat(600);
    bench.refused(&["run", "--model", model, &long], 2, &["does not fit a context of 512"]);
    bench.refused(&["run", "--json", "--nodes", "2", "--model", model, &long], 2, &["does not fit"]);
    bench.refused(&["run", "--model", model, "--context", "513", "hi"], 2, &["513", "512"]);
    bench.refused(&["run", "--raw", "--model", model, ""], 2, &["empty"]);
    // Before the answer, not after it.
    bench.refused(&["run", "--trace", "/nowhere/t.json", "--model", model, "hi"], 2, &["/nowhere/t.json"]);
    bench.refused(&["perplexity", "--text", "/nowhere/text", "--model", model], 2, &["/nowhere/text"]);
    let config = fs::read_to_string(toy.join("tokenizer_config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config.as_object_mut().unwrap().remove("chat_template");
    fs::write(toy.join("tokenizer_config.json"), config.to_string()).unwrap();
    bench.refused(&["run", "--model", model, "hi"], 2, &["no chat template", "--raw"]);
    bench.refused(&["chat", "--alone", "--model", model], 2, &["no chat template", "run --raw"]);
    config["chat_template"] = "{% for %}".into();
    fs::write(toy.join("tokenizer_config.json"), config.to_string()).unwrap();
    bench.refused(&["run", "--model", model, "hi"], 2, &["template"]);
    fs::remove_file(toy.join("tokenizer.json")).unwrap();
    bench.refused(&["run", "--model", model, "hi"], 2, &["tokenizer"]);
    let odd = bench.write(&spec("llama").with_config("model_type", "gpt_neox".into()), "odd");
    bench.refused(&["run", "--model", odd.to_str().unwrap(), "hi"], 2, &["gpt_neox"]);
}

#[test]
fn numbers_that_make_no_sense() {
    let bench = Bench::new();
    let toy = bench.toy();
    let run = |args: &[&str], texts: &[&str]| {
        let all = [&["run", "--model", toy.to_str().unwrap()], args, &["hi"]].concat();
        bench.refused(&all, 2, texts);
    };
    run(&["--layers", "0..2,3..4"], &["given cut", "start at layer 2"]);
    run(&["--layers", "0..2"], &["given cut", "2..4"]);
    run(&["--layers", "0..9"], &["given cut"]);
    run(&["--layers", "2..1,1..4"], &["given cut"]);
    run(&["--layers", "all"], &["--layers", "0..11,11..22"]);
    run(&["--layers", "0..4", "--nodes", "2"], &["--layers", "--nodes"]);
    run(&["--nodes", "5"], &["5 nodes cannot share 4 layers"]);
    run(&["--nodes", "0"], &["--nodes"]);
    run(&["--temperature", "-1"], &["temperature is -1", "between 0 and 100"]);
    run(&["--temperature", "nan"], &["temperature"]);
    run(&["--top-p", "0"], &["top_p"]);
    run(&["--min-p", "2"], &["min_p"]);
    run(&["--repetition-penalty", "0"], &["repetition_penalty"]);
    run(&["--stop", ""], &["--stop"]);
    run(&["--cores", "9999"], &["no core 9999"]);
    run(&["--memory", "8 apples"], &["--memory", "8GB"]);
    run(&["--memory", "1kB"], &["1.0 kB", "free memory"]);
    run(&["--peer", "nonsense"], &["--peer", "host:port"]);
    run(&["--max-tokens", "0"], &["--max-tokens"]);
    bench.refused(&["verify", "--model", toy.to_str().unwrap()], 2, &["--nodes"]);
    for (variable, value) in [("SWARM_OS_LOG", "[["), ("SWARM_OS_KERNELS", "fastest")] {
        let mut command = bench.command(&["models"]);
        let finished =
            swarm_testkit::Proc::spawn(command.env(variable, value)).unwrap().finish(SOON).unwrap();
        assert_eq!(finished.status.code(), Some(2));
        assert!(finished.stderr.contains(variable) && finished.stderr.contains(value), "{finished:?}");
    }
}

#[test]
fn a_port_in_use() {
    let bench = Bench::new();
    let taken = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    bench.refused(&["worker", "--port", &port], 2, &[&port, "in use", "choose another"]);
}

#[test]
fn nobody_is_there() {
    let bench = Bench::new();
    let toy = bench.toy();
    let model = toy.to_str().unwrap();
    // Other tests' workers may be in the room, but they are of other swarms.
    let asked = ["--role", "A", "--model", model, "--wait", "1"];
    let error = bench.refused(&asked, 3, &["no worker was found", "swarm-os worker", "firewall", "--peer"]);
    assert!(error.contains("secret"), "{error}");
    bench.refused(&["--role", "A", "--model", model, "--no-discovery"], 2, &["nowhere to look", "--peer"]);
    bench.refused(&["--role", "A", "--model", model, "--alone"], 2, &["--alone"]);
    let closed = format!("127.0.0.1:{}", swarm_testkit::free_port().unwrap());
    let finished = bench.run(&["run", "--model", model, "--peer", &closed, "--wait", "1", "hi"]);
    assert_eq!(finished.status.code(), Some(3));
    assert!(finished.stderr.contains(&closed), "{finished:?}");
}

#[test]
fn a_worker_with_another_model() {
    let bench = Bench::new();
    let (toy, other) = (bench.toy(), bench.write(&spec("llama").with_seed(99), "other"));
    let (_worker, address) = bench.worker("there", &other);
    let args = ["run", "--split", "always", "--model", toy.to_str().unwrap(), "--peer", &address, "hi"];
    bench.refused(
        &args,
        2,
        &["there-", "this worker holds other, which is not the coordinator's", "same files"],
    );
}

#[test]
fn a_worker_of_another_swarm() {
    let (bench, stranger) = (Bench::new(), Bench::new());
    let toy = bench.toy();
    let (mut worker, address) = stranger.worker("there", &toy);
    let args = ["run", "--model", toy.to_str().unwrap(), "--peer", &address, "--wait", "3", "hi"];
    let finished = bench.run(&args);
    assert_eq!(finished.status.code(), Some(3), "{finished:?}");
    assert!(finished.stderr.contains("another swarm"), "{finished:?}");
    worker.expect(SOON, "\"stranger\"").unwrap();
    // With its secret the same call is welcome.
    let secret = stranger.run(&["secret", "export"]).stdout;
    let mut import = bench.start(&["secret", "import"]);
    import.say(secret.trim()).unwrap();
    assert!(import.finish(SOON).unwrap().status.success());
    assert!(bench.run(&args).status.success());
}

#[test]
fn a_secret_that_is_none() {
    let bench = Bench::new();
    bench.refused(&["secret", "import", "12345"], 2, &["secret"]);
    assert!(!bench.home.path().join("swarm.secret").exists());
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let bench = Bench::new();
    let toy = bench.toy();
    let run =
        bench.command(&["run", "--raw", "--max-tokens", "200", "--model", toy.to_str().unwrap(), "hen"]);
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", "\"$0\" \"$@\" | head -c 1 >/dev/null"]).arg(run.get_program()).args(run.get_args());
    bench.home.apply(&mut shell);
    let finished = swarm_testkit::Proc::spawn(&mut shell).unwrap().finish(SOON).unwrap();
    assert_eq!(finished.stderr, "");
}
