//! The greedy recipe, apart from where models lie and how they are scored.

use serde::Serialize;

use crate::error::Result;

/// Scores a candidate soup: the mean of the listed ingredients. Larger is better.
pub trait Score {
    /// The score of the mean of `ingredients`.
    ///
    /// # Errors
    /// Whatever evaluation meets.
    fn score(&mut self, ingredients: &[usize]) -> Result<f64>;
}

impl<F: FnMut(&[usize]) -> Result<f64>> Score for F {
    fn score(&mut self, ingredients: &[usize]) -> Result<f64> {
        self(ingredients)
    }
}

/// One step of the recipe.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Step {
    /// The ingredient that was tried.
    pub ingredient: usize,
    /// Its own score.
    pub alone: f64,
    /// The score of the soup with it.
    pub with: f64,
    /// Whether it stayed in.
    pub accepted: bool,
}

/// The result of the recipe.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Recipe {
    /// Ingredients that stayed, in order of their own score.
    pub kept: Vec<usize>,
    /// The score of their mean.
    pub score: f64,
    /// All steps, the first being the best single model.
    pub steps: Vec<Step>,
}

/// Sorts `count` ingredients by their own score (ties by input order), starts with the best, and adds
/// each of the others in turn if the soup with it scores at least as well (`strict`: better). One pass,
/// no way back: `2 count - 1` scores.
///
/// # Errors
/// Whatever scoring meets.
pub fn greedy(count: usize, strict: bool, scorer: &mut dyn Score) -> Result<Recipe> {
    let mut order: Vec<(usize, f64)> = (0..count)
        .map(|ingredient| Ok((ingredient, scorer.score(&[ingredient])?)))
        .collect::<Result<_>>()?;
    // A score that is not a number goes last.
    let rank = |score: f64| if score.is_nan() { f64::NEG_INFINITY } else { score };
    order.sort_by(|a, b| rank(b.1).total_cmp(&rank(a.1)));
    let (best, alone) = order[0];
    let mut recipe = Recipe {
        kept: vec![best],
        score: alone,
        steps: vec![Step { ingredient: best, alone, with: alone, accepted: true }],
    };
    for &(ingredient, alone) in &order[1..] {
        let mut candidate = recipe.kept.clone();
        candidate.push(ingredient);
        let with = scorer.score(&candidate)?;
        let accepted = if strict { with > recipe.score } else { with >= recipe.score };
        if accepted {
            (recipe.kept, recipe.score) = (candidate, with);
        }
        recipe.steps.push(Step { ingredient, alone, with, accepted });
    }
    Ok(recipe)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_scorer_that_rejects_everything_leaves_the_best() {
        let mut scorer = |soup: &[usize]| Ok(if soup.len() == 1 { soup[0] as f64 } else { -1.0 });
        let recipe = greedy(4, false, &mut scorer).unwrap();
        assert_eq!((recipe.kept, recipe.score), (vec![3], 3.0));
    }

    #[test]
    fn a_constant_scorer_keeps_all_unless_strict() {
        let mut constant = |_: &[usize]| Ok(0.5);
        assert_eq!(greedy(5, false, &mut constant).unwrap().kept, [0, 1, 2, 3, 4]);
        assert_eq!(greedy(5, true, &mut constant).unwrap().kept, [0]);
    }

    proptest! {
        #[test]
        fn no_single_model_is_better(scores in prop::collection::vec(0u32..1000, 1..9), strict: bool) {
            let mut scorer = |soup: &[usize]| {
                // Means help or hurt in a way that only depends on the members.
                let sum: u32 = soup.iter().map(|k| scores[*k]).sum();
                let bonus = soup.iter().fold(0u32, |h, k| h.wrapping_mul(31).wrapping_add(*k as u32)) % 200;
                Ok(f64::from(sum) / soup.len() as f64 + if soup.len() > 1 { f64::from(bonus) } else { 0.0 })
            };
            let recipe = greedy(scores.len(), strict, &mut scorer).unwrap();
            prop_assert!(scores.iter().all(|score| recipe.score >= f64::from(*score)));
            prop_assert_eq!(recipe.steps.len(), scores.len());
        }
    }
}
