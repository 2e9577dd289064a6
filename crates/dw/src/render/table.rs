//! Tables of text: columns as wide as they need to be, the last one wrapped to the terminal.

use console::{Term, measure_text_width, style};

use super::text::printable;

/// Narrowest useful width of the last column; below it nothing is wrapped.
const NARROWEST: usize = 24;

/// Rows in columns, under a heading or without one.
#[derive(Debug)]
pub(crate) struct Table {
    columns: usize,
    has_head: bool,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column names.
    pub(crate) fn new<const N: usize>(head: [&str; N]) -> Self {
        Self { columns: N, has_head: true, rows: vec![head.map(str::to_owned).to_vec()] }
    }

    /// A table without a heading.
    pub(crate) fn plain(columns: usize) -> Self {
        Self { columns, has_head: false, rows: Vec::new() }
    }

    /// Adds a row, one cell for each column.
    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.map(|cell| printable(&cell.replace('\n', " ")).into_owned()).to_vec());
    }

    /// The table as text for standard output.
    pub(crate) fn render(&self) -> String {
        let width = Term::stdout().size_checked().map(|(_, columns)| usize::from(columns));
        let mut text = String::new();
        for (index, line) in self.lines(width).into_iter().enumerate() {
            text += &if index == 0 && self.has_head { style(line).bold().to_string() } else { line };
            text += "\n";
        }
        text
    }

    fn lines(&self, width: Option<usize>) -> Vec<String> {
        let last = self.columns - 1;
        let widths: Vec<usize> = (0..last).map(|column| self.column_width(column)).collect();
        let indent = widths.iter().map(|width| width + 2).sum::<usize>();
        let room = width.and_then(|width| width.checked_sub(indent)).filter(|room| *room >= NARROWEST);
        let mut lines = Vec::new();
        for row in &self.rows {
            let mut start = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                start += cell;
                start += &" ".repeat(width + 2 - measure_text_width(cell));
            }
            for part in wrap(&row[last], room) {
                lines.push(format!("{start}{part}").trim_end().to_owned());
                start = " ".repeat(indent);
            }
        }
        lines
    }

    fn column_width(&self, column: usize) -> usize {
        self.rows.iter().map(|row| measure_text_width(&row[column])).max().unwrap_or_default()
    }
}

/// Breaks text between words; a word that is wider than the room stays whole.
fn wrap(text: &str, room: Option<usize>) -> Vec<String> {
    let Some(room) = room else { return vec![text.to_owned()] };
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("there is always a line");
        if line.is_empty() {
            line.push_str(word);
        } else if measure_text_width(line) + 1 + measure_text_width(word) <= room {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_the_last_one_wraps_below_itself() {
        let mut table = Table::new(["NAME", "MEANING"]);
        table.row(["a".into(), "one two three four five six".into()]);
        table.row(["long".into(), String::new()]);
        assert_eq!(table.lines(Some(30)), ["NAME  MEANING", "a     one two three four five", "      six", "long"]);
        assert_eq!(table.lines(None)[1], "a     one two three four five six");
    }
}
