//! Tables in Markdown.

use std::path::Path;

use crate::error::Result;
use crate::files::write_atomic;

/// What stands where no figure is known.
pub const UNKNOWN: &str = "-";

/// A table with its title and the lines that say how it was made.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Markdown {
    /// Heading.
    pub title: String,
    /// Paragraphs before the table: settings, device.
    pub notes: Vec<String>,
    /// Column names.
    pub header: Vec<String>,
    /// Cells, one for every column.
    pub rows: Vec<Vec<String>>,
    /// Paragraphs behind the table: what its figures do not say.
    pub remarks: Vec<String>,
}

impl std::fmt::Display for Markdown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "# {}\n", self.title)?;
        for note in &self.notes {
            writeln!(f, "{note}\n")?;
        }
        writeln!(f, "| {} |", self.header.join(" | "))?;
        writeln!(f, "|{}", " --- |".repeat(self.header.len()))?;
        for row in &self.rows {
            let cells: Vec<String> = row.iter().map(|cell| cell.replace('|', "\\|")).collect();
            writeln!(f, "| {} |", cells.join(" | "))?;
        }
        for remark in &self.remarks {
            writeln!(f, "\n{remark}")?;
        }
        Ok(())
    }
}

impl Markdown {
    /// Writes `NAME.md`, the table, and `NAME.json`, the same cells and `data` beside them.
    ///
    /// # Errors
    /// An unwritable file.
    pub fn write(&self, folder: &Path, name: &str, data: serde_json::Value) -> Result<()> {
        let text = self.to_string();
        write_atomic(&folder.join(format!("{name}.md")), |out| out.write_all(text.as_bytes()))?;
        let object = serde_json::json!({
            "table": self,
            "data": data,
            "version": env!("CARGO_PKG_VERSION"),
        });
        write_atomic(&folder.join(format!("{name}.json")), |out| {
            serde_json::to_writer_pretty(&mut *out, &object)?;
            out.write_all(b"\n")
        })
    }
}

/// 0.5313 -> "53.13"; a dash for what is not known.
pub fn percent(fraction: Option<f64>) -> String {
    fraction.map_or(UNKNOWN.into(), |value| format!("{:.2}", 100.0 * value))
}

/// 378391 -> "378,391".
pub fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let chunks: Vec<&[u8]> = digits.as_bytes().rchunks(3).rev().collect();
    chunks.into_iter().map(String::from_utf8_lossy).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_markdown_and_its_file_is_the_same_text() {
        let table = Markdown {
            title: "Table 9".into(),
            notes: vec!["How.".into()],
            header: vec!["a".into(), "b".into()],
            rows: vec![vec!["1|2".into(), percent(None)], vec!["3".into(), percent(Some(0.5))]],
            remarks: vec!["Beware.".into()],
        };
        let expected = "# Table 9\n\nHow.\n\n| a | b |\n| --- | --- |\n| 1\\|2 | - |\n| 3 | 50.00 |\n\
                        \nBeware.\n";
        assert_eq!(table.to_string(), expected);
        let folder = tempfile::tempdir().unwrap();
        table.write(folder.path(), "table9", serde_json::json!([1])).unwrap();
        assert_eq!(std::fs::read_to_string(folder.path().join("table9.md")).unwrap(), expected);
        let json = std::fs::read(folder.path().join("table9.json")).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!((&json["table"]["rows"][1][1], &json["data"][0]), (&"50.00".into(), &1.into()));
    }

    #[test]
    fn thousands_are_grouped() {
        for (value, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(value), text);
        }
    }
}
