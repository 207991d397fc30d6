//! Numbers as a reader wants them: as many digits as matter, with units.

/// A count with thousands separators.
pub fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Bytes in decimal units, three significant digits.
pub fn bytes(value: u64) -> String {
    scaled(value as f64, &["B", "kB", "MB", "GB", "TB"])
}

/// A number of parameters: `134 M`.
pub fn parameters(value: u64) -> String {
    scaled(value as f64, &["", "k", "M", "B", "T"]).trim_end().to_owned()
}

fn scaled(mut value: f64, units: &[&str]) -> String {
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 99.95 {
        0
    } else if value >= 9.995 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {}", units[unit])
}

/// Seconds as `0.42 s`, `12.3 s` or `3 min 05 s`.
pub fn seconds(value: f64) -> String {
    match value {
        v if v < 10.0 => format!("{v:.2} s"),
        v if v < 59.95 => format!("{v:.1} s"),
        v => format!("{} min {:02} s", (v.round() / 60.0) as u64, v.round() as u64 % 60),
    }
}

/// About four significant digits, never an exponent below a million.
pub fn plain(value: f64) -> String {
    match value.abs() {
        v if !v.is_finite() => "not finite".to_owned(),
        v if v >= 1e7 => format!("{value:.2e}"),
        v if v >= 1000.0 => count(value.round() as u64),
        v if v >= 100.0 => format!("{value:.1}"),
        v if v >= 10.0 => format!("{value:.2}"),
        v if v >= 0.1 || v == 0.0 => format!("{value:.3}"),
        v if v >= 0.001 => format!("{value:.4}"),
        _ => format!("{value:.1e}"),
    }
}

/// A number without trailing zeros, for axis labels.
pub fn tick(value: f64) -> String {
    if value >= 1000.0 {
        return count(value.round() as u64);
    }
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_and_digits() {
        assert_eq!(count(1234567), "1,234,567");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(92_010_000), "92.0 MB");
        assert_eq!(parameters(134_515_008), "135 M");
        assert_eq!(seconds(185.2), "3 min 05 s");
        assert_eq!(seconds(59.97), "1 min 00 s");
        assert_eq!(plain(23.456), "23.46");
        assert_eq!(plain(12345.6), "12,346");
        assert_eq!(tick(0.5), "0.5");
        assert_eq!(tick(100.0), "100");
    }
}
