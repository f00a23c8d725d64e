//! The short code that two machines meet by.

use std::fmt;

use zeroize::Zeroize;

use crate::error::IdentityError;

const DIGITS: usize = 8;
const CODES: u32 = 100_000_000;

/// Eight digits, shown as `1234-5678`: one machine shows them, a person types them at the other. Wiped on drop.
#[derive(Clone, PartialEq, Eq)]
pub struct PairCode([u8; DIGITS]);

impl PairCode {
    /// A new random code, each of the 10^8 equally likely.
    ///
    /// # Errors
    /// [`IdentityError::Random`] when the system gives no random bytes.
    pub fn random() -> Result<Self, IdentityError> {
        // Numbers over the last whole multiple are drawn again: otherwise low codes would come more often.
        let fair = u32::MAX - u32::MAX % CODES;
        loop {
            let number = getrandom::u32().map_err(IdentityError::Random)?;
            if number < fair {
                let mut rest = number % CODES;
                let mut digits = [0; DIGITS];
                for digit in digits.iter_mut().rev() {
                    *digit = b'0' + (rest % 10) as u8;
                    rest /= 10;
                }
                return Ok(Self(digits));
            }
        }
    }

    /// Reads what a person typed. Spaces and dashes do not matter.
    ///
    /// # Errors
    /// [`PairCodeError`] when it is not eight digits.
    pub fn parse(text: &str) -> Result<Self, PairCodeError> {
        let mut digits = [0; DIGITS];
        let mut got = 0usize;
        for char in text.chars().filter(|char| *char != '-' && !char.is_whitespace()) {
            if !char.is_ascii_digit() {
                return Err(PairCodeError);
            }
            *digits.get_mut(got).ok_or(PairCodeError)? = char as u8;
            got += 1;
        }
        if got == DIGITS { Ok(Self(digits)) } else { Err(PairCodeError) }
    }

    pub(crate) fn digits(&self) -> &[u8; DIGITS] {
        &self.0
    }
}

/// The code as it is shown: `1234-5678`.
impl fmt::Display for PairCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, digit) in self.0.iter().enumerate() {
            let dash = if index == DIGITS / 2 { "-" } else { "" };
            write!(f, "{dash}{}", char::from(*digit))?;
        }
        Ok(())
    }
}

impl fmt::Debug for PairCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PairCode(hidden)")
    }
}

impl Drop for PairCode {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// A text that is not a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a code is eight digits, for example 1234-5678; read it again from the other machine's screen")]
pub struct PairCodeError;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn codes_are_typed_in_many_ways_and_never_logged() {
        let code = PairCode::parse(" 0012-3456\n").unwrap();
        assert_eq!(code.to_string(), "0012-3456");
        assert_eq!(PairCode::parse("00 12 34 56"), Ok(code.clone()));
        for wrong in ["", "1234567", "123456789", "1234-567a", "１２３４５６７８"] {
            assert_eq!(PairCode::parse(wrong), Err(PairCodeError), "{wrong}");
        }
        assert_eq!(format!("{code:?}"), "PairCode(hidden)");
        assert_ne!(PairCode::random().unwrap(), PairCode::random().unwrap());
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".*", number in 0..CODES) {
            let _ = PairCode::parse(&text);
            let shown = format!("{:04}-{:04}", number / 10_000, number % 10_000);
            prop_assert_eq!(PairCode::parse(&shown).unwrap().to_string(), shown);
        }
    }
}
