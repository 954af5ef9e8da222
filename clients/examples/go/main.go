// Recommendations, predictions and a chat from a ShopLM server, with deadlines, retries, a token and error details.
//
//	go run . [customer id]      SHOPLM_ADDRESS and SHOPLM_TOKEN say where and as whom
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	shoplmv1 "shoplm-example/shoplm/v1"
)

func main() {
	config, err := os.ReadFile("../service_config.json") // retries
	check(err)
	conn, err := grpc.Dial(address(), grpc.WithInsecure(), grpc.WithDefaultServiceConfig(string(config)))
	check(err)
	defer conn.Close()
	models := shoplmv1.NewModelServiceClient(conn)
	recommendations := shoplmv1.NewRecommendationServiceClient(conn)
	predictions := shoplmv1.NewPredictionServiceClient(conn)
	chats := shoplmv1.NewChatServiceClient(conn)

	ctx, end := call(30 * time.Second)
	defer end()
	health, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
	check(err)
	fmt.Println("health:", health.Status)
	model, err := models.GetModel(ctx, &shoplmv1.GetModelRequest{})
	check(err)
	id := model.DemoCustomerIds[0]
	if len(os.Args) > 1 {
		id = os.Args[1]
	}
	customer := &shoplmv1.Customer{CustomerId: id}

	ctx, end = call(30 * time.Second)
	defer end()
	items, err := recommendations.Recommend(ctx, &shoplmv1.RecommendRequest{Customer: customer, Count: 3})
	check(err)
	for _, item := range items.Items {
		fmt.Printf("item: %s %s %.2f\n", item.ItemId, item.Title, item.Score)
	}
	answer, err := predictions.Predict(ctx, &shoplmv1.PredictRequest{Customer: customer, Targets: model.Targets[:1]})
	check(err)
	first := answer.Predictions[0]
	fmt.Printf("prediction: %v within %d days %.3f\n", first.Target.Kind, first.Target.HorizonDays, first.GetProbability())

	ctx, end = call(60 * time.Second)
	defer end()
	question := []*shoplmv1.Message{{Role: "user", Content: "What does delivery cost?"}}
	stream, err := chats.Chat(ctx, &shoplmv1.ChatRequest{Customer: customer, Messages: question, MaxTokens: 32})
	check(err)
	fmt.Print("chat: ")
	for {
		event, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		check(err)
		fmt.Print(event.GetDelta())
		if summary := event.GetSummary(); summary != nil {
			fmt.Println("\nended:", summary.FinishReason)
		}
	}

	ctx, cancel := call(60 * time.Second)
	question[0].Content = "Tell me everything about coffee."
	stream, err = chats.Chat(ctx, &shoplmv1.ChatRequest{Messages: question})
	check(err)
	_, err = stream.Recv()
	check(err)
	cancel() // the server stops computing within one step
	for err == nil {
		_, err = stream.Recv()
	}
	fmt.Println("cancelled:", status.Code(err) == codes.Canceled)

	ctx, end = call(30 * time.Second)
	defer end()
	_, err = recommendations.Recommend(ctx, &shoplmv1.RecommendRequest{Customer: customer, Count: 1_000_000})
	explain(err)
}

func address() string {
	if where := os.Getenv("SHOPLM_ADDRESS"); where != "" {
		return where
	}
	return "127.0.0.1:50051"
}

// call is the context of a call: its deadline, which the server sees, and the token.
func call(timeout time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	if token := os.Getenv("SHOPLM_TOKEN"); token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}
	return ctx, cancel
}

// explain prints what the google.rpc details of an error say.
func explain(err error) {
	failed := status.Convert(err)
	fmt.Println("error:", failed.Code(), failed.Message())
	for _, detail := range failed.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			fmt.Println("reason:", detail.Reason)
		case *errdetails.BadRequest:
			for _, violation := range detail.FieldViolations {
				fmt.Printf("wrong: %s %s\n", violation.Field, violation.Description)
			}
		case *errdetails.RetryInfo:
			delay := time.Duration(detail.RetryDelay.Seconds)*time.Second + time.Duration(detail.RetryDelay.Nanos)
			fmt.Println("try again in:", delay)
		}
	}
}

func check(err error) {
	if err != nil {
		explain(err)
		log.Fatal("the call failed")
	}
}
