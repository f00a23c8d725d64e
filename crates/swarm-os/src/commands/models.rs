use crate::args::ModelsArgs;
use crate::failure::Failure;
pub fn models(_: &ModelsArgs) -> Result<(), Failure> { Ok(()) }
