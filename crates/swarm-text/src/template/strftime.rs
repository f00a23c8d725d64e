//! `strftime` for `strftime_now`: the C locale, in UTC.
//!
//! Hugging Face uses local time. UTC is used here because a swarm's nodes may sit in different zones and the same
//! chat must give the same prompt.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const FORMAT_BYTES_MAX: usize = 256;

struct Moment {
    year: i64,
    /// 1..=12
    month: u64,
    /// 1..=31
    day: u64,
    /// 1..=366
    day_of_year: u64,
    /// 0 is Sunday
    weekday: u64,
    hour: u64,
    minute: u64,
    second: u64,
}

/// Times before 1970 are taken as 1970, times after 9999 as 9999.
fn moment(now: SystemTime) -> Moment {
    const SECONDS_MAX: u64 = 253_402_300_799; // 9999-12-31 23:59:59
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()).min(SECONDS_MAX);
    let (days, second_of_day) = (seconds / 86_400, seconds % 86_400);
    // Years counted from March of year 0, in eras of 400 years: leap days come last.
    // Source: H. Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let march_day = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * march_day + 2) / 153;
    let day = march_day - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let leap = (year.is_multiple_of(4) && !year.is_multiple_of(100)) || year.is_multiple_of(400);
    let day_of_year = match march_month {
        0..=9 => march_day + 60 + u64::from(leap), // March 1 is day 60 or 61
        _ => march_day - 305,                      // January 1 is day 306 of the March year
    };
    Moment {
        year: i64::try_from(year).unwrap_or(9999),
        month,
        day,
        day_of_year,
        weekday: (days + 4) % 7, // 1970-01-01 was a Thursday
        hour: second_of_day / 3600,
        minute: second_of_day / 60 % 60,
        second: second_of_day % 60,
    }
}

/// Formats `now` (UTC). An unknown directive is an error, not silence.
pub(super) fn format(now: SystemTime, format: &str) -> Result<String, String> {
    if format.len() > FORMAT_BYTES_MAX {
        return Err(format!("strftime format of {} bytes", format.len()));
    }
    let now = moment(now);
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let (directive, padded) = match rest.next() {
            Some('-') => (rest.next(), false),
            directive => (directive, true),
        };
        let Some(directive) = directive else { return Err("strftime format ends with %".to_owned()) };
        now.write(&mut out, directive, padded)
            .ok_or_else(|| format!("strftime has no {directive:?} here"))?;
    }
    Ok(out)
}

impl Moment {
    fn write(&self, out: &mut String, directive: char, padded: bool) -> Option<()> {
        let month = MONTHS.get(usize::try_from(self.month.checked_sub(1)?).ok()?)?;
        let weekday = WEEKDAYS.get(usize::try_from(self.weekday).ok()?)?;
        let hour12 = match self.hour % 12 {
            0 => 12,
            hour => hour,
        };
        let (number, width) = match directive {
            'd' | 'e' => (self.day, 2),
            'm' => (self.month, 2),
            'y' => (self.year.rem_euclid(100).unsigned_abs(), 2),
            'Y' => (self.year.unsigned_abs(), 4),
            'H' => (self.hour, 2),
            'I' => (hour12, 2),
            'M' => (self.minute, 2),
            'S' => (self.second, 2),
            'j' => (self.day_of_year, 3),
            'w' => (self.weekday, 1),
            _ => {
                let text = match directive {
                    'B' => *month,
                    'b' | 'h' => month.get(..3)?,
                    'A' => *weekday,
                    'a' => weekday.get(..3)?,
                    'p' => {
                        if self.hour < 12 {
                            "AM"
                        } else {
                            "PM"
                        }
                    }
                    'Z' => "UTC",
                    'z' => "+0000",
                    'n' => "\n",
                    't' => "\t",
                    '%' => "%",
                    'F' | 'T' | 'R' | 'D' => return self.write_compound(out, directive),
                    _ => return None,
                };
                out.push_str(text);
                return Some(());
            }
        };
        match (padded, directive) {
            (true, 'e') => write!(out, "{number:>width$}"),
            (true, _) => write!(out, "{number:0width$}"),
            (false, _) => write!(out, "{number}"),
        }
        .ok()
    }

    fn write_compound(&self, out: &mut String, directive: char) -> Option<()> {
        let Moment { year, month, day, hour, minute, second, .. } = self;
        match directive {
            'F' => write!(out, "{year:04}-{month:02}-{day:02}"),
            'T' => write!(out, "{hour:02}:{minute:02}:{second:02}"),
            'R' => write!(out, "{hour:02}:{minute:02}"),
            'D' => write!(out, "{month:02}/{day:02}/{:02}", year.rem_euclid(100)),
            _ => return None,
        }
        .ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn at(seconds: u64, spec: &str) -> String {
        format(UNIX_EPOCH + Duration::from_secs(seconds), spec).expect("a known format")
    }

    // Expected values are Python's datetime.fromtimestamp(seconds, UTC).strftime.
    #[test]
    fn known_moments() {
        assert_eq!(at(0, "%A %d %B %Y %H:%M:%S %j"), "Thursday 01 January 1970 00:00:00 001");
        assert_eq!(at(951_782_400, "%a %d %b %Y %j %y"), "Tue 29 Feb 2000 060 00");
        assert_eq!(at(1_735_689_599, "%F %T %j %p %I"), "2024-12-31 23:59:59 366 PM 11");
        assert_eq!(at(1_740_787_200, "%d %b %Y %j"), "01 Mar 2025 060");
        assert_eq!(at(1_709_251_200, "%-d %B, %Y %j%%"), "1 March, 2024 061%");
        assert_eq!(at(4_107_542_399, "%D %R %w"), "02/28/00 23:59 0"); // 2100 is not a leap year
        assert_eq!(at(4_107_542_400, "%d %b %Y"), "01 Mar 2100");
        assert_eq!(at(u64::MAX >> 2, "%Y"), "9999");
    }

    #[test]
    fn unknown_and_unfinished_directives_are_errors() {
        for spec in ["%Q", "%", "%-", "%\u{1F600}"] {
            assert!(format(UNIX_EPOCH, spec).is_err(), "{spec}");
        }
        assert!(format(UNIX_EPOCH, &"x".repeat(1000)).is_err());
    }

    #[test]
    fn every_day_of_four_centuries_follows_the_one_before() {
        let mut last = moment(UNIX_EPOCH);
        for day in 1..146_097u64 {
            let next = moment(UNIX_EPOCH + Duration::from_secs(day * 86_400));
            assert_eq!(next.weekday, (last.weekday + 1) % 7);
            let new_month = next.day == 1;
            let new_year = new_month && next.month == 1;
            assert_eq!(next.day_of_year, if new_year { 1 } else { last.day_of_year + 1 }, "day {day}");
            assert!(new_month || (next.day == last.day + 1 && next.month == last.month), "day {day}");
            assert_eq!(next.year, last.year + i64::from(new_year));
            last = next;
        }
    }
}
