//go:build !race

package survey_test

const many = 50_000
