//! What `cargo xtask bench-peer` was asked for.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result, bail};

pub const HELP: &str = "\
cargo xtask bench-peer [OPTIONS]: the engine beside llama.cpp, same files, same threads, same run
  --formats LIST               models: smol (SmolLM2 Q4_1), or a tensor type for a random model of the shape of
                               TinyLlama-1.1B: f32 f16 bf16 q4_0 q4_1 q5_0 q5_1 q8_0 q2_k q3_k q4_k q5_k q6_k, or the
                               mixture q4_k_m [default: q4_0,smol,q8_0,q4_k,f16]
  --layers N                   layers of the random models [default: 22]
  --threads LIST               thread counts [default: 1,2]
  --cores LIST                 cores to pin to; the first ones are used [default: from 0 on]
  --prompt-tokens N            [default: 512]
  --gen-tokens N               [default: 128]
  --rounds N                   pairs of runs per line [default: 5]
  --sessions N                 also this many sessions at once, with most threads; 0: none [default: 8]
  --session-prompt-tokens N    prompt of each of them [default: 16]
  --python PATH                an interpreter that has llama_cpp; without it one is made under target/bench-peer
  --json FILE                  every number of every run";

/// Formats of `--formats` that the toy generator makes.
const GENERATED: [&str; 14] = [
    "f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k",
    "q4_k_m",
];

#[derive(Clone, Debug, PartialEq)]
pub struct Args {
    pub formats: Vec<String>,
    pub layers: usize,
    pub threads: Vec<usize>,
    pub cores: Vec<usize>,
    pub prompt_tokens: usize,
    pub gen_tokens: usize,
    pub rounds: usize,
    pub sessions: usize,
    pub session_prompt_tokens: usize,
    pub python: Option<PathBuf>,
    pub json: Option<PathBuf>,
}

impl Default for Args {
    fn default() -> Args {
        Args {
            formats: ["q4_0", "smol", "q8_0", "q4_k", "f16"].map(String::from).to_vec(),
            layers: 22,
            threads: vec![1, 2],
            cores: Vec::new(),
            prompt_tokens: 512,
            gen_tokens: 128,
            rounds: 5,
            sessions: 8,
            session_prompt_tokens: 16,
            python: None,
            json: None,
        }
    }
}

impl Args {
    /// # Errors
    /// On an unknown option, a value that is no number, or numbers that do not fit together.
    pub fn parse(words: &[&str]) -> Result<Args> {
        let mut args = Args::default();
        let mut words = words.iter();
        while let Some(&option) = words.next() {
            let mut value =
                || words.next().copied().with_context(|| format!("{option} wants a value\n{HELP}"));
            match option {
                "--formats" => args.formats = list(option, value()?)?,
                "--layers" => args.layers = number(option, value()?)?,
                "--threads" => args.threads = list(option, value()?)?,
                "--cores" => args.cores = list(option, value()?)?,
                "--prompt-tokens" => args.prompt_tokens = number(option, value()?)?,
                "--gen-tokens" => args.gen_tokens = number(option, value()?)?,
                "--rounds" => args.rounds = number(option, value()?)?,
                "--sessions" => args.sessions = number(option, value()?)?,
                "--session-prompt-tokens" => args.session_prompt_tokens = number(option, value()?)?,
                "--python" => args.python = Some(value()?.into()),
                "--json" => args.json = Some(value()?.into()),
                other => bail!("bench-peer does not know `{other}`\n{HELP}"),
            }
        }
        args.check()?;
        Ok(args)
    }

    fn check(&mut self) -> Result<()> {
        for format in &mut self.formats {
            *format = format.to_ascii_lowercase();
            if format != "smol" && !GENERATED.contains(&format.as_str()) {
                bail!("--formats knows smol, {}, but not `{format}`", GENERATED.join(", "));
            }
        }
        for (option, value, least) in [
            ("--layers", self.layers, 1),
            ("--prompt-tokens", self.prompt_tokens, 1),
            ("--session-prompt-tokens", self.session_prompt_tokens, 1),
            // The first token comes out of prefill, so one alone has no decode to time.
            ("--gen-tokens", self.gen_tokens, 2),
            ("--rounds", self.rounds, 1),
            ("--threads", self.threads.iter().copied().min().unwrap_or(0), 1),
        ] {
            if value < least {
                bail!("{option} wants at least {least}, not {value}");
            }
        }
        let most = self.threads_max();
        if self.cores.is_empty() {
            self.cores = (0..most).collect();
        }
        let mut distinct = self.cores.clone();
        distinct.sort_unstable();
        distinct.dedup();
        if distinct.len() != self.cores.len() || self.cores.len() < most {
            bail!("--cores wants at least {most} different cores for {most} threads");
        }
        Ok(())
    }

    pub fn threads_max(&self) -> usize {
        self.threads.iter().copied().max().unwrap_or(1)
    }
}

fn number<T: FromStr>(option: &str, text: &str) -> Result<T> {
    text.parse().ok().with_context(|| format!("{option} does not take `{text}`"))
}

/// Comma-separated values, at least one.
fn list<T: FromStr>(option: &str, text: &str) -> Result<Vec<T>> {
    text.split(',').map(|part| number(option, part.trim())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_words_the_defaults_hold() {
        let args = Args::parse(&[]).unwrap();
        assert_eq!(args, Args { cores: vec![0, 1], ..Args::default() });
    }

    #[test]
    fn every_option_is_taken() {
        let words = "--formats F16,smol,q4_k_m --layers 2 --threads 1,3 --cores 4,5,6 --prompt-tokens 64 --gen-tokens 8 \
                     --rounds 1 --sessions 0 --session-prompt-tokens 4 --python /opt/python --json out.json";
        let args = Args::parse(&words.split_whitespace().collect::<Vec<_>>()).unwrap();
        let want = Args {
            formats: ["f16", "smol", "q4_k_m"].map(String::from).to_vec(),
            layers: 2,
            threads: vec![1, 3],
            cores: vec![4, 5, 6],
            prompt_tokens: 64,
            gen_tokens: 8,
            rounds: 1,
            sessions: 0,
            session_prompt_tokens: 4,
            python: Some("/opt/python".into()),
            json: Some("out.json".into()),
        };
        assert_eq!(args, want);
        assert_eq!(args.threads_max(), 3);
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        for words in [
            "--formats q9",
            "--formats",
            "--formats f16,,q8_0",
            "--layers 0",
            "--layers two",
            "--gen-tokens 1",
            "--rounds 0",
            "--threads 0,1",
            "--threads 1,2 --cores 0",
            "--threads 2 --cores 1,1",
            "--fast",
        ] {
            let words: Vec<_> = words.split_whitespace().collect();
            assert!(Args::parse(&words).is_err(), "{words:?}");
        }
    }
}
